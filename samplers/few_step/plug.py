"""FewStep: the plug that sets everything a few-step checkpoint needs, on the pipeline at hand."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffplug.intercept import Undo, current_scheduler, intercept_call, intercept_step, interceptors
from diffplug.samplers.few_step import lookup
from diffplug.samplers.few_step.catalogue import MERGES, Row
from diffplug.samplers.few_step.checkpoint import Installed, Paths, Strength, install
from diffplug.samplers.few_step.families import denoiser_name, family_of, unwrapped
from diffplug.samplers.few_step.run import FewStepCall, FewStepSteps
from diffplug.samplers.few_step.schedule import scheduler_for, takes_eta
from diffplug.scheduler.plug import swap


class FewStep:
    """A few-step checkpoint by name: LoRA, scheduler, timesteps or sigmas, eta and guidance together.

        with plug(pipe, FewStep("hyper-sd", steps=4)):
            image = pipe("a red circle").images[0]

    name: a row's name or alias (`diffplug names --few-step` lists them), also with its steps ("lightning-4",
    "hyper-sd@4"); the folder or file of a `recipe.json`; or a `Row`. The row for the pipeline's family and
    the number of steps is taken; without steps, the call's `num_inference_steps` or the row's default.
    strength: of the LoRA, 1 as trained (scales that files do not store are applied); one number for each
    transformer where there are two. merge: "auto", "runtime" (adapter) or "fuse" (float32, then rounded).
    guidance: a guidance scale against the row's advice. eta: noise of the steps, 0 to 1, in place of the
    row's. part: the share of the run in which the LoRA acts, (0.0, 0.5) for its first half. schedule: False
    takes weights and guidance only and leaves scheduler and steps to another plug, a searched schedule for
    instance. weights: a local file, or one for each transformer, in place of the hub's. catalogue: rows of
    one's own (`Row`, JSON file, or a list), looked through first.

    `row` is known at once where name and steps leave no choice, else after attaching; `installed` says what
    was done to which component. Raises ValueError, before anything is changed, for unknown names, steps or
    families that a name has no row for, files that are missing or do not fit; and in a call for steps,
    strength or guidance that the row cannot take.
    """

    def __init__(
        self,
        name: str | os.PathLike[str] | Row,
        steps: int | None = None,
        *,
        strength: Strength = 1.0,
        merge: str = "auto",
        guidance: float | None = None,
        eta: float | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        schedule: bool = True,
        weights: Paths = None,
        catalogue: Any = None,
    ) -> None:
        self.name, self.steps, self._rows = _resolved(name, steps, catalogue)
        self.strength, self.merge, self.guidance, self.eta = strength, merge, guidance, eta
        self.part, self.schedule, self.weights = part, schedule, weights
        self.installed: list[Installed] = []
        _check_options(self)

    @property
    def slot(self) -> str:
        """What it claims of a pipeline: the scheduler, or only that there is one few-step checkpoint."""
        return "scheduler" if self.schedule else "few-step"

    def row_for(self, pipe: Any) -> Row:
        """Return the row that is taken on a pipeline; ValueError when none fits."""
        return lookup.row_for(self.name, family_of(pipe), self.steps, self._rows)

    def attach(self, pipe: Any) -> Undo:
        """Put everything on the pipeline; return the function that takes it off, exactly."""
        row = self.row_for(pipe)
        if any(isinstance(each, FewStepCall) for each in interceptors(pipe)):
            raise ValueError(f"{row.name}: the pipeline carries a few-step checkpoint already: undo it first")
        _check_pipeline(row, pipe)
        _check_idle(self, row)
        whole = self.part == (0.0, 1.0)
        if row.doubt:
            warnings.warn(f"{row.name} is not verified: {row.doubt}", stacklevel=4)
        undos: list[Undo] = []

        def undo() -> None:
            _all(undos)

        try:
            # what can be refused comes before what is slow
            scheduler = scheduler_for(row, pipe, self.eta) if self.schedule else None
            _check_eta(self.eta, row, scheduler or current_scheduler(pipe))
            self.installed, back = install(
                row, pipe, strength=self.strength, merge=self.merge, paths=self.weights, whole=whole
            )
            undos.append(back)
            self._on(row, pipe, scheduler, whole, undos)
        except BaseException:
            undo()
            raise
        return undo

    def _on(self, row: Row, pipe: Any, scheduler: Any, whole: bool, undos: list[Undo]) -> None:
        """Put scheduler, told time, boundary, and what stands around calls and steps on the pipeline."""
        if scheduler is not None:
            undos.append(swap(pipe, scheduler))
        if row.told_scale != 1.0:
            undos.append(tell_scaled(pipe, row.told_scale))
        if row.boundary_ratio is not None:
            undos.append(_boundary(pipe, row.boundary_ratio))
        if row.guidance == "off" and self.guidance is None:
            undos.append(_guider_off(pipe))
        steps = FewStepSteps(row, pipe, self.installed, self.part, self.eta if self.schedule else None)
        if steps.needed(whole, self.schedule):
            undos.append(intercept_step(current_scheduler(pipe), steps))
        call = FewStepCall(row, pipe, self.steps, self.guidance, self.eta, steps if self.schedule else None)
        undos.append(intercept_call(pipe, call))

    def __repr__(self) -> str:
        told = [f", {name}={getattr(self, name)!r}" for name in _USUAL if getattr(self, name) != _USUAL[name]]
        return f"FewStep({self.name!r}, steps={self.steps}{''.join(told)})"


_USUAL: dict[str, Any] = {
    "strength": 1.0,
    "merge": "auto",
    "guidance": None,
    "eta": None,
    "part": (0.0, 1.0),
    "schedule": True,
    "weights": None,
}
"""Options that a plug's text leaves out."""


def named(text: str) -> FewStep:
    """Return the plug that a name means: "hyper-sd@4", "lightning-4", "hyper-sd", or a folder with a recipe.

    ValueError with the nearest names for an unknown one.
    """
    return FewStep(text)


def _resolved(name: Any, steps: int | None, catalogue: Any) -> tuple[str, int | None, tuple[Row, ...]]:
    """Return name, steps and the rows to choose from."""
    if isinstance(name, Row):
        return name.name, steps, (name,)
    if isinstance(name, os.PathLike) or _is_path(name):
        row = Row.load(name)
        return row.name, steps, (row,)
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} names no few-step recipe: give a name, the path of a recipe.json, or a Row"
        )
    rows = lookup.all_rows(catalogue)
    plain, told = lookup.split(name, rows)
    if told is not None and steps is not None and told != steps:
        raise ValueError(f"{name!r} says {told} steps, steps={steps}: give one of the two")
    return plain, steps if told is None else told, rows


def _is_path(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name != ""
        and (name.endswith(".json") or (os.sep in name) or Path(name).is_dir())
    )


def _check_options(plug: FewStep) -> None:
    """Raise ValueError for options that cannot be meant."""
    steps = plug.steps
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps is {steps!r}: give a whole number of at least 1")
    if plug.merge not in MERGES:
        raise ValueError(f"merge is {plug.merge!r}, allowed are {', '.join(map(repr, MERGES))}")
    for value in _numbers(plug.strength):
        if not _finite(value):
            raise ValueError(f"strength is {plug.strength!r}: give finite numbers, 1 as trained")
    if plug.guidance is not None and not (_finite(plug.guidance) and plug.guidance >= 0):
        raise ValueError(f"guidance is {plug.guidance!r}: give a finite number of at least 0")
    if plug.eta is not None and not (_finite(plug.eta) and 0 <= plug.eta <= 1):
        raise ValueError(f"eta is {plug.eta!r}, allowed is 0 (deterministic) to 1 (all noise new)")
    start, end = plug.part if isinstance(plug.part, tuple) and len(plug.part) == 2 else (1.0, 0.0)
    if not 0 <= start < end <= 1:
        raise ValueError(f"part is {plug.part!r}: give two numbers 0 <= start < end <= 1")
    rows = [row for row in plug._rows if plug.name in (row.name, *row.aliases) and not row.refused]
    if steps is not None and rows and not any(steps in row.steps for row in rows):
        offered = ", ".join(map(str, sorted({n for row in rows for n in row.steps})))
        raise ValueError(f"{plug.name} has no {steps} steps, only {offered}: take one of them")
    if plug.eta is not None and not plug.schedule:
        raise ValueError(
            "eta belongs to the steps, which schedule=False leaves to another plug: leave it out"
        )


def _check_idle(plug: FewStep, row: Row) -> None:
    """Raise ValueError for options that would do nothing with a row."""
    if row.kind == "lora":
        known = {weights.component for weights in row.weights}
        if isinstance(plug.strength, Mapping) and set(plug.strength) - known:
            wrong = ", ".join(sorted(set(plug.strength) - known))
            raise ValueError(f"strength names {wrong}: {row.name} changes {', '.join(sorted(known))}")
        return
    defaults: dict[str, Any] = {"merge": "auto", "part": (0.0, 1.0)}
    if row.kind != "sara":
        defaults["strength"] = 1.0
    for name, default in defaults.items():
        if getattr(plug, name) != default:
            given = f"{name}={getattr(plug, name)!r}"
            whole = "all of the motion modules" if row.kind == "motion" else f"a whole {row.kind}"
            raise ValueError(f"{given} is for a LoRA: {row.name} is {whole}, leave it out")


def _check_eta(eta: float | None, row: Row, scheduler: Any) -> None:
    """Raise ValueError where no step would read eta."""
    if eta is not None and not (takes_eta(scheduler) or "eta" in scheduler.config):
        raise ValueError(f"eta={eta:g} does nothing: {row.name} runs on {type(scheduler).__name__}")


def _numbers(strength: Any) -> list[Any]:
    if isinstance(strength, Mapping):
        return list(strength.values())
    return list(strength) if isinstance(strength, Sequence) and not isinstance(strength, str) else [strength]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_pipeline(row: Row, pipe: Any) -> None:
    """Warn where a row of a whole pipeline meets one that says it was loaded from elsewhere."""
    home = str(getattr(pipe, "name_or_path", "") or "")
    if row.kind != "pipeline" or not row.weights or home.count("/") != 1 or Path(home).is_dir():
        return
    if home not in {weights.repo for weights in row.weights}:
        repos = " or ".join(weights.repo for weights in row.weights)
        warnings.warn(
            f"{row.name} is for the weights of {repos}, this pipeline has those of {home}", stacklevel=5
        )


def tell_scaled(pipe: Any, scale: float) -> Undo:
    """Tell the denoiser timestep * scale, whatever the pipeline passes; return the undo."""

    def scaled(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": kwargs["timestep"] * scale}
        return (args[0], args[1] * scale, *args[2:]), kwargs

    module = unwrapped(getattr(pipe, denoiser_name(pipe)))
    return module.register_forward_pre_hook(scaled, with_kwargs=True).remove


def _guider_off(pipe: Any) -> Undo:
    """Switch off the guider of pipelines that guide through an object of their own; return the undo."""
    guider = getattr(pipe, "guider", None)
    if guider is None or not getattr(guider, "_enabled", False):
        return lambda: None
    guider.disable()
    return guider.enable


def _boundary(pipe: Any, ratio: float) -> Undo:
    """Let the second transformer take over below this share of the timesteps; return the undo."""
    before = pipe.config.get("boundary_ratio")
    pipe.register_to_config(boundary_ratio=ratio)

    def undo() -> None:
        pipe.register_to_config(boundary_ratio=before)

    return undo


def _all(undos: list[Undo]) -> None:
    """Call every undo, the last one first; the first error is raised after all had their turn."""
    first: BaseException | None = None
    while undos:
        try:
            undos.pop()()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
