"""A training run put together: model, prompts, teacher, student and tuner from one config.

    job = Job.read("trajectory", "four.toml", ["run.updates=200"])
    train(job, Path("runs/four"))

A method is an `Objective` with three more names: `Settings`, the frozen dataclass behind the config's table
[objective]; `DEFAULTS`, a config that lies below the person's; and `from_job(job)`. `diffplug train METHOD`
finds it in `diffplug.registry.TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from diffplug.registry import TRAINERS
from diffplug.training.conditions import (
    CallForm,
    Conditions,
    encode,
    null_condition,
    one_denoiser,
    with_embedded_guidance,
)
from diffplug.training.config import (
    OptimizerSettings,
    RunSettings,
    as_mapping,
    merged,
    overridden,
    read_toml,
    settings,
)
from diffplug.training.data import DataSettings, Pictures, prompts_of
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath, edges
from diffplug.training.precision import any_precision
from diffplug.training.student import Sampling
from diffplug.training.trajectories import TeacherSettings, Trajectories, TrajectoryStore
from diffplug.training.tuner import Tuner
from diffplug.training.tuners.by_name import check_tuner, tuner_of
from diffplug.training.tuners.earlier_student import student_file
from diffplug.training.tuners.settings import TunerSettings
from diffplug.training.validation import ValidationSettings

__all__ = ["Job", "JobSettings", "StudentSettings", "TunerSettings"]


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What the student becomes.

    steps: evaluations it is for. start: an earlier student to begin from, the folder of a run or a few-step
    name ("shapes"). eta: noise of DDIM's steps when it is drawn with. guidance: None bakes the teacher's
    guidance in; a number distils the unguided teacher and the empty prompt too, so that guidance at about
    this scale, and negative prompts, act as before. name: in the recipe.
    """

    steps: int = 4
    start: str | None = None
    eta: float = 0.0
    guidance: float | None = None
    name: str = "student"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {self.eta}")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The config of `diffplug train`, a field a table. model: name, folder or hub id; revision: of it."""

    model: str = "shapes"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    data: DataSettings = field(default_factory=DataSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    tuner: TunerSettings = field(default_factory=TunerSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)


class Job:
    """Settings, and what they name, each made when it is first asked for.

    method: the objective's class. config: its settings; `objective` those of the method. device: where to
    compute. cache: folder of trajectories and latents, which several runs may share.
    """

    def __init__(
        self,
        name: str,
        config: JobSettings,
        objective: Any,
        *,
        device: str = "cpu",
        cache: Path | None = None,
    ) -> None:
        self.name, self.config, self.objective = name, config, objective
        self.method: Any = TRAINERS.get(name)
        self.device, self.cache = device, cache or Path("runs/cache")
        self.previous: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def read(cls, name: str, path: str | Path | None, changes: Sequence[str] = (), **options: Any) -> Job:
        """Return the job of a method, a TOML file (None for the defaults alone) and changes "a.b=c".

        Raises ValueError in one line for whatever is wrong with them.
        """
        method = TRAINERS.get(name)
        own = read_toml(path) if path is not None else {}
        defaults = getattr(method, "defaults", None)
        below = defaults(overridden(own, changes)) if defaults else getattr(method, "DEFAULTS", {})
        mine = overridden(own, changes).get("tuner", {})
        if isinstance(mine, Mapping) and mine.get("kind") in ("full", "sara"):
            below = _without_targets(below)  # a method's own choice of layers is for its adapter
        values = overridden(merged(below, own), changes)
        told = values.pop("objective", {})
        if not isinstance(told, Mapping):
            raise ValueError(f"objective must be a table, got {told!r}")
        objective = settings(method.Settings, told, "objective")
        return cls(name, settings(JobSettings, values), objective, **options)

    def mapping(self) -> dict[str, Any]:
        """Return the whole config as plain values, for checkpoints and records."""
        return {"method": self.name, **as_mapping(self.config), "objective": as_mapping(self.objective)}

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, on the device, its weights frozen."""
        from diffplug.loading import load

        options: dict[str, Any] = {"dtype": getattr(torch, self.config.dtype)}
        if self.config.revision:
            options["revision"] = self.config.revision
        pipe = load(self.config.model, **options).to(self.device)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        if any(p.ndim == 4 for p in one_denoiser(pipe).parameters()):
            one_denoiser(pipe).to(memory_format=torch.channels_last)
        if self.config.dtype != "float32":
            any_precision(one_denoiser(pipe))
        return pipe

    @cached_property
    def prompts(self) -> list[str]:
        """The training prompts; a method may say which by `prompts(job)`."""
        told = getattr(self.method, "prompts", None)
        if told is not None:
            found: list[str] = told(self)
            return found
        return prompts_of(self.config.data, self.pipe)

    @cached_property
    def call(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call, for conditions and pictures alike.

        A denoiser that is told the guidance scale is told that of the stored trajectories, where a method
        learns from them, and else teacher.call's or the pipeline's default.
        """
        stored = getattr(self.method, "needs_store", lambda job: False)(self)
        scale = self.config.teacher.guidance if stored else None
        return with_embedded_guidance(self.pipe, self.config.teacher.call, scale)

    @cached_property
    def _encoded(self) -> tuple[CallForm, Conditions]:
        return encode(self.pipe, self.prompts[:1], call=self.call)

    @cached_property
    def path(self) -> NoisePath:
        """The model's noise path; a flow's shift is that of the stored trajectories where there are some."""
        shift = self.store.shift() if "store" in vars(self) and self.store.count() else None
        return NoisePath.of(self.pipe.scheduler, shift)

    @cached_property
    def tuner(self) -> Tuner:
        """The tuner, attached to the denoiser, with the weights of an earlier student where one was named.

        A method may attach one of its own by `tuner_of(job)`.
        """
        own = getattr(self.method, "tuner_of", None)
        if own is not None:
            found: Tuner = own(self)
            return found
        told, student = self.config.tuner, self.config.student
        file = None if student.start is None else student_file(self.pipe, student.start, student.steps)
        torch.manual_seed(self.config.run.seed)
        tuner: Any = tuner_of(told)
        tuner.attach(one_denoiser(self.pipe))
        if file is not None:
            tuner.load(file)
        attached: Tuner = tuner
        return attached

    @cached_property
    def network(self) -> Network:
        """The denoiser as objectives call it."""
        form, _ = self._encoded
        null = self.null if self.guided else None
        return Network(one_denoiser(self.pipe), self.path, form, self.tuner, null)

    @property
    def guided(self) -> bool:
        """Whether the method asks the teacher for guidance during training."""
        return bool(getattr(self.method, "needs_null", lambda job: False)(self))

    @cached_property
    def null(self) -> Conditions:
        """The condition without a prompt."""
        return null_condition(self.pipe, self._encoded[0], call=self.call)

    @cached_property
    def store(self) -> TrajectoryStore:
        """The teacher's trajectories: those that are there; `filled` makes the missing ones."""
        teacher = self.config.teacher
        if self.config.student.guidance is not None:
            teacher = replace(teacher, guidance=1.0 if teacher.guidance is not None else None)
        prompts = self.config.data.with_empty(self.prompts, self.config.student.guidance is not None)
        one = TrajectoryStore.of(
            self.pipe, prompts, teacher, self.cache / "trajectories" / self._teacher_name
        )
        return one

    @property
    def _teacher_name(self) -> str:
        import hashlib
        import json

        told: dict[str, Any] = {"model": self.config.model, "data": as_mapping(self.config.data)}
        told |= {"teacher": as_mapping(self.config.teacher), "guidance": self.config.student.guidance}
        for idle in ("trajectories", "filter", "keep"):
            told["teacher"].pop(idle)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def trajectories(self, steps: int) -> Trajectories:
        """Return the stored trajectories at the edges of `steps` segments, filtered as configured."""
        teacher = self.config.teacher
        wanted = edges(self.path, steps)[::-1]
        if teacher.filter is not None:
            self.store.keep_right(teacher.filter, teacher.keep, teacher.trajectories)
        return self.store.load(wanted, teacher.trajectories)

    @cached_property
    def conditions(self) -> Conditions:
        """The conditions of all training prompts, on the CPU."""
        return encode(self.pipe, self.prompts, call=self.call)[1]

    @cached_property
    def pictures(self) -> Pictures | None:
        """The pictures of data.pictures as latents, with conditions; None where there are none."""
        if self.config.data.pictures is None:
            return None
        return Pictures.of(self.pipe, self.config.data, self.cache / "latents", self.call)

    def check(self) -> None:
        """Raise ValueError for settings that the model, its timesteps or files cannot serve."""
        told, start = self.config.tuner, self.config.student.start
        reads = getattr(self.method, "reads_pictures", None)
        if self.config.data.pictures is not None and not (reads and reads(self)):
            raise ValueError(
                f"data.pictures would do nothing: this run of {self.name} does not train on pictures "
                "(finetune does)"
            )
        edges(NoisePath.of(self.pipe.scheduler), self.config.student.steps)
        check_tuner(told, one_denoiser(self.pipe))
        if start is not None and not hasattr(self.method, "tuner_of"):
            student_file(self.pipe, start, self.config.student.steps)
        if not self.prompts:
            raise ValueError("there are no prompts")
        if self.config.dtype == "float16" and self.config.run.precision == "bf16" and self.device == "cpu":
            raise ValueError(
                "dtype=float16 and run.precision=bf16 do not go together on a CPU: take dtype=bfloat16"
            )

    def sampling(self) -> Sampling:
        """How the student is drawn with; a method may say otherwise by a `sampling(job)` of its own."""
        own = getattr(self.method, "sampling", None)
        if own is not None:
            found: Sampling = own(self)
            return found
        student = self.config.student
        return Sampling(self.path, (student.steps,), student.eta, student.guidance)


def _without_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    tuner = {key: value for key, value in config.get("tuner", {}).items() if key != "targets"}
    return {**config, "tuner": tuner}
