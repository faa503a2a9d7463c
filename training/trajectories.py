"""Trajectories of a guided teacher, made once and kept: what students learn from without a picture.

    store = TrajectoryStore.of(pipe, prompts, TeacherSettings(), folder=Path("runs/store"))
    store.fill(1500)                           # only those that are missing
    store.keep_right("shapes:strict")          # those whose last picture a reward passes
    data = store.load(indices=[1000, 750, 500, 250, 0])

The pipeline runs as a person would run it, any sampler and guidance included; its states are noted at
`scheduler.step` and stored in half precision, with the prompts' conditions. Trajectory i depends on
(settings, prompt i, seed + i) alone, so parts can be made by several processes, in any order, and more can be
added. A folder belongs to one teacher: its key is a hash of the weights, the prompts and every setting.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug import noise, rewards
from diffplug.files import atomic_path, output_folder, read_json, write_json
from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.latents import decode
from diffplug.plug import plug
from diffplug.samplers import by_name as stock
from diffplug.samplers.fingerprint import conditioning_fingerprint, fingerprint
from diffplug.seeds import Seeds
from diffplug.training.conditions import (
    Conditions,
    embeds_guidance,
    encode,
    one_denoiser,
    with_embedded_guidance,
)
from diffplug.training.noise_path import NoisePath
from diffplug.training.precision import autocast
from diffplug.watch import quiet

__all__ = ["PART", "TeacherSettings", "Trajectories", "TrajectoryStore"]

PART = 50  # trajectories in a file, and in a call of the pipeline


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """How the teacher draws.

    sampler: a name of Diffusers' own solvers (`diffplug names`), "own" for the pipeline's. steps: of the
    solver; must be a multiple of the student's. guidance: None for a pipeline without. call: further
    arguments of the pipeline (height, width, max_sequence_length). seed: of the first trajectory.
    trajectories: how many. filter: a reward whose score of the last picture must be at least `keep`.
    """

    sampler: str | None = "dpm++"
    steps: int = 24
    guidance: float | None = 5.0
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    trajectories: int = 1500
    precision: str = "bf16"
    filter: str | None = None
    keep: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "trajectories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)}")
        if self.guidance is not None and not 0 <= self.guidance < 1000:
            raise ValueError(f"guidance must be from 0 to 1000, got {self.guidance}")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision must be 'no' or 'bf16', got {self.precision!r}")


@dataclass(frozen=True)
class Trajectories:
    """States [n, m, ...] at m indices, the noisiest first; the conditions and prompts of n trajectories."""

    states: Tensor
    index: Tensor
    conditions: Conditions
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.states)


class TrajectoryStore:
    """The trajectories of one teacher in a folder. Build it with `of`."""

    def __init__(
        self, pipe: Any, prompts: Sequence[str], teacher: TeacherSettings, folder: Path, key: str
    ) -> None:
        self.pipe, self.prompts, self.teacher, self.folder, self.key = (
            pipe,
            list(prompts),
            teacher,
            folder,
            key,
        )
        self._right: list[bool] | None = None

    @classmethod
    def of(cls, pipe: Any, prompts: Sequence[str], teacher: TeacherSettings, folder: Path) -> TrajectoryStore:
        """Return the store of a teacher in `folder`; trajectory i has prompt i modulo their number.

        Raises ValueError where the folder holds trajectories of another one.
        """
        if not any(prompt.strip() for prompt in prompts):
            raise ValueError("there are no prompts: give one a line")
        key = _key(pipe, prompts, teacher)
        output_folder(folder)
        told = folder / "store.json"
        if told.exists() and read_json(told).get("key") != key:
            raise ValueError(
                f"{str(folder)!r} holds trajectories of another teacher, other prompts or settings: take "
                f"another folder, or remove it"
            )
        if not told.exists():
            write_json(told, {"key": key, "part": PART, "teacher": _told(teacher)})
        return cls(pipe, prompts, teacher, folder, key)

    def part(self, number: int) -> Path:
        """Return the file of trajectories number * PART and the following."""
        return self.folder / f"part-{number:05d}.safetensors"

    def fill(
        self,
        count: int,
        *,
        rank: int = 0,
        processes: int = 1,
        on_part: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Make what is missing of the first `count`; each process makes every `processes`-th file."""
        numbers = range(rank, -(-count // PART), processes)
        missing = [number for number in numbers if not _whole(self.part(number))]
        on_part((len(numbers) - len(missing)) * PART)
        if not missing:
            return
        dtype = torch.bfloat16 if self.teacher.precision == "bf16" else None
        with quiet(self.pipe), autocast(one_denoiser(self.pipe), dtype):
            for number in missing:
                self._make(number)
                on_part(PART)

    def _make(self, number: int) -> None:
        from safetensors.torch import save_file

        rows = range(number * PART, (number + 1) * PART)
        prompts = [self.prompt(row) for row in rows]
        states, index, shift = self._run(prompts, [self.teacher.seed + row for row in rows])
        told = with_embedded_guidance(self.pipe, self.teacher.call, self.teacher.guidance)
        _, conditions = encode(self.pipe, prompts, call=told)
        tensors = {"states": states, "index": index, "shift": torch.tensor([shift], dtype=torch.float64)}
        tensors |= {
            f"condition/{name}": value.half() if value.is_floating_point() else value
            for name, value in conditions.leaves.items()
        }
        with atomic_path(self.part(number)) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)

    def _run(self, prompts: list[str], seeds: list[int]) -> tuple[Tensor, Tensor, float]:
        """Return states [n, m + 1, ...] float16, their indices [m + 1], and a flow's shift."""
        call: dict[str, Any] = {**self.teacher.call, "num_inference_steps": self.teacher.steps}
        if self.teacher.guidance is not None:
            call["guidance_scale"] = self.teacher.guidance
        with _sampling(self.pipe, self.teacher, call) as plugs, plug(self.pipe, *plugs, Seeds(seeds)):
            recorder = _Recorder()
            undo = intercept_step(self.pipe.scheduler, recorder)
            try:
                final = self.pipe(prompt=prompts, output_type="latent", **call)[0]
            finally:
                undo()
            path = NoisePath.of(self.pipe.scheduler, recorder.shift(self.teacher.steps))
        states = [path.standard(x, *level) for x, level in recorder.states]
        index = [path.index_of(*level) for _, level in recorder.states]
        last = path.standard(final.detach().float().cpu(), *recorder.last)
        told = torch.tensor([*index, path.index_of(*recorder.last)], dtype=torch.float64)
        return torch.stack([*states, last], dim=1).half(), told, path.shift

    def prompt(self, number: int) -> str:
        """Return the prompt of a trajectory."""
        return self.prompts[number % len(self.prompts)]

    def count(self) -> int:
        """Return how many trajectories there are, from the first on without a gap."""
        number = 0
        while self.part(number).exists():
            number += 1
        return number * PART

    def shift(self) -> float:
        """Return the shift of a flow model, 1 for others."""
        from safetensors import safe_open

        with safe_open(self.part(0), framework="pt") as file:
            return float(file.get_tensor("shift")[0])

    def keep_right(self, reward: str, least: float = 1.0, count: int | None = None) -> float:
        """Keep the trajectories whose last picture scores at least `least`; return their share.

        Pictures of the empty prompt are kept: there is nothing that they could be right about. The scores
        are kept beside the parts, so that only new pictures are scored.
        """
        count = self.count() if count is None else count
        scores = [score for number in range(-(-count // PART)) for score in self._scores(number, reward)]
        self._right = [score >= least for score in scores[:count]]
        if not any(self._right):
            raise ValueError(
                f"none of {count} trajectories scores {least:g} by {reward!r}: take a lower teacher.keep, "
                f"or none"
            )
        return sum(self._right) / count

    def _scores(self, number: int, reward: str) -> list[float]:
        file = self.part(number).with_suffix(".scores.json")
        known = read_json(file) if file.exists() else {}
        if reward not in known:
            known[reward] = self._scored(number, rewards.get(reward))
            write_json(file, known)
        return [float(score) for score in known[reward]]

    @torch.no_grad()
    def _scored(self, number: int, reward: Any) -> list[float]:
        from safetensors import safe_open

        with safe_open(self.part(number), framework="pt") as file:
            last = file.get_slice("states")[:, -1]
        device = next(one_denoiser(self.pipe).parameters()).device
        size: dict[str, Any] = {
            name: self.teacher.call.get(name) for name in ("height", "width", "num_frames")
        }
        images = decode(self.pipe, last.to(device, self._decoder_dtype()), **size).cpu()
        images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
        prompts = [self.prompt(number * PART + i) for i in range(len(last))]
        told = [i for i, prompt in enumerate(prompts) if prompt]
        given = rewards.score(reward, images[told], [prompts[i] for i in told]).tolist() if told else []
        judged = {i: _LOST if math.isnan(score) else score for i, score in zip(told, given, strict=True)}
        return [judged.get(i, _KEPT) for i in range(len(prompts))]

    def _decoder_dtype(self) -> torch.dtype:
        vae = getattr(self.pipe, "vae", None)
        return torch.float32 if vae is None else next(vae.parameters()).dtype

    def load(self, index: Sequence[float], count: int | None = None) -> Trajectories:
        """Return the states at these indices of the first `count` trajectories, those kept by `keep_right`.

        Raises ValueError where the teacher's steps do not go through an index.
        """
        from safetensors import safe_open

        count = self.count() if count is None else min(count, self.count())
        parts: list[tuple[Tensor, Conditions]] = []
        for number in range(-(-count // PART)):
            with safe_open(self.part(number), framework="pt") as file:
                columns = _columns(file.get_tensor("index"), index, self.teacher.steps)
                states = file.get_slice("states")[:][:, columns]
                names = [name for name in file.keys() if name.startswith("condition/")]  # noqa: SIM118
                leaves = {name.removeprefix("condition/"): file.get_tensor(name) for name in names}
            parts.append((states, Conditions(leaves)))
        kept = [i for i in range(count) if self._right is None or self._right[i]]
        rows = torch.tensor(kept)
        return Trajectories(
            torch.cat([states for states, _ in parts])[rows],
            torch.tensor(list(index), dtype=torch.float64),
            Conditions.cat([conditions for _, conditions in parts])[rows],
            [self.prompt(i) for i in kept],
        )


_KEPT, _LOST = 1e30, -1e30
"""Scores, which JSON can hold, of a picture that no reward judges and of one that a reward rates NaN."""


class _Recorder(StepInterceptor):
    """The samples that the scheduler is given, with their levels; the last step's level too."""

    def __init__(self) -> None:
        self.states: list[tuple[Tensor, tuple[float, float]]] = []
        self.last = (1.0, 0.0)

    def on_step(self, call: StepCall) -> Any:
        here = noise.level(call.scheduler, call.timestep)
        there = noise.next_level(call.scheduler, call.timestep)
        self.states.append((call.sample.detach().float().cpu(), (here.alpha, here.sigma)))
        self.last = (there.alpha, there.sigma)
        return call.run()

    def shift(self, steps: int) -> float | None:
        """Return the shift of a flow whose unshifted sigmas were 1, 1 - 1/n, ..., None for other models."""
        levels = [level for _, level in self.states]
        if len(levels) < 2 or abs(levels[0][0] + levels[0][1] - 1) > 1e-4 or levels[0][0] > 1e-3:
            return None
        u, s = 1 - 1 / steps, levels[1][1]
        return s * (1 - u) / (u * (1 - s))


@contextmanager
def _sampling(pipe: Any, teacher: TeacherSettings, call: dict[str, Any]) -> Iterator[list[Any]]:
    """The plugs that give the pipeline the teacher's solver, on a grid that goes through equal segments."""
    flow = NoisePath.of(pipe.scheduler).flow
    if flow:
        if "sigmas" in inspect.signature(pipe.__call__).parameters:
            call["sigmas"] = [1 - j / teacher.steps for j in range(teacher.steps)]
        yield []
        return
    name = teacher.sampler
    cls = type(pipe.scheduler) if name in (None, "own") else stock.sampler(str(name), pipe)
    if not (isinstance(cls, type) or hasattr(cls, "set_timesteps")):
        raise ValueError(f"teacher.sampler {name!r} is no solver of Diffusers: take ddim or dpm++")
    own: Any = cls if isinstance(cls, type) else type(cls)
    known = inspect.signature(own).parameters
    wanted = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "final_sigmas_type": "zero"}
    options = {name: value for name, value in wanted.items() if name in known}
    yield [own.from_config(pipe.scheduler.config, **options)]


def _columns(there: Tensor, wanted: Sequence[float], steps: int) -> list[int]:
    found = []
    for index in wanted:
        column = int((there - index).abs().argmin())
        if abs(float(there[column]) - index) > 0.51:
            raise ValueError(
                f"the teacher's {steps} steps do not divide into the student's: none ends at index "
                f"{index:g} of "
                f"{float(there[0]):g}. Take teacher.steps that are a multiple of the student's steps"
            )
        found.append(column)
    return found


def _key(pipe: Any, prompts: Sequence[str], teacher: TeacherSettings) -> str:
    told = {
        "denoiser": fingerprint(pipe),
        "encoders": conditioning_fingerprint(pipe),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "scheduler": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        **_told(teacher),
    }
    if embeds_guidance(pipe):
        told["conditions"] = "with the teacher's scale"
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _told(teacher: TeacherSettings) -> dict[str, Any]:
    """Return the settings that a trajectory depends on."""
    idle = ("trajectories", "filter", "keep")
    return {name: value for name, value in asdict(teacher).items() if name not in idle}


def _whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "states" in file.keys()  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return False
