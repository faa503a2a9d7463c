"""Solver: the plug that samples a pipeline with schedules of its own and puts the old scheduler back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from diffplug.call_arguments import asked_guidance, asked_steps, given_grid
from diffplug.intercept import PipelineCall, Undo
from diffplug.samplers.fingerprint import check_origin, made_for_guidance
from diffplug.samplers.library import book_to_config, shipped_names, shipped_schedules
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.attach import attached, check_names, fitted, remade
from diffplug.samplers.solver.scheduler import CONSTRUCTOR, SolverScheduler
from diffplug.samplers.solver.unet_skip_scale import scaled_skips


@dataclass(frozen=True, init=False)
class Solver:
    """A plug that swaps a pipeline's scheduler for a `SolverScheduler` with these schedules.

    schedules: a `SolverSchedule`, its JSON, the path of a file, or a list of those, for different numbers of
    steps and, by meta["guidance_scale"], for different guidance; or "shapes" for the searched ones that come
    with the package. config: any other option of
    `SolverScheduler`, among them solver= and grid= for runs without a schedule; what is not given comes from
    the pipeline's own scheduler. Without schedules it is the preset of solver= (UniPC by default).

    At each call of the pipeline the entry of the steps asked for is taken, and among several that of the
    nearest guidance; a warning says where the match is not exact, and where schedules were searched for other
    weights. Raises ValueError at once for unknown options and bad schedules, on attaching for a model with
    noise that UniPC cannot express and for another model than the one they were searched for (where they say
    so), and on a call for steps that no schedule has, unless solver= is given.
    """

    slot: ClassVar[str] = "scheduler"

    schedules: tuple[SolverSchedule, ...]
    config: Mapping[str, Any]

    def __init__(self, schedules: Any = None, **config: Any) -> None:
        check_names("Solver", config, CONSTRUCTOR, "schedules")
        found = tuple(_loaded(each) for each in _listed(schedules))
        SolverScheduler(**config)
        object.__setattr__(self, "schedules", found)
        object.__setattr__(self, "config", MappingProxyType(dict(config)))
        _check_distinct(found)

    def __reduce__(self) -> Any:
        return remade, (type(self), {"schedules": self.schedules}, dict(self.config))

    def book(self, guidance: float | None = None) -> dict[str, Any] | None:
        """For each number of steps the schedule of the nearest guidance, as JSON; None without schedules."""
        nearest: dict[int, SolverSchedule] = {}
        for schedule in self.schedules:
            kept = nearest.get(schedule.nfe)
            if kept is None or _distance(schedule, guidance) < _distance(kept, guidance):
                nearest[schedule.nfe] = schedule
        return book_to_config(list(nearest.values())) if nearest else None

    def scheduler_for(self, pipe: Any) -> SolverScheduler:
        """A new scheduler for the pipeline's model; the pipeline is left alone."""
        scheduler: SolverScheduler = fitted(SolverScheduler, pipe, **self.config, schedules=self.book())
        return scheduler

    def attach(self, pipe: Any) -> Undo:
        """Replace `pipe.scheduler`; returns the function that puts the very same object back."""
        scheduler = self.scheduler_for(pipe)
        check_origin("schedule", (schedule.meta for schedule in self.schedules), pipe)
        if not self.schedules:
            return attached(pipe, scheduler)

        def around(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
            steps = None if given_grid(kwargs) is not None else asked_steps(pipe, kwargs)
            self._choose(scheduler, steps, asked_guidance(pipe, kwargs))
            with scaled_skips(pipe, self._skips(scheduler, steps)):
                return call(**kwargs)

        return attached(pipe, scheduler, around)

    def _skips(self, scheduler: SolverScheduler, steps: Any) -> Any:
        """The skip coefficients of a call's schedule, None for none."""
        entry = (scheduler.config.schedules or {}).get(str(steps))
        return None if entry is None else entry.get("skips")

    def _choose(self, scheduler: SolverScheduler, steps: Any, guidance: float | None) -> None:
        """Give the scheduler the schedules for a call, and warn where they were made for another one."""
        book = self.book(guidance)
        scheduler.register_to_config(schedules=book)
        entry = None if book is None or steps is None else book.get(str(steps))
        if entry is None:
            if steps is not None and scheduler.config.solver:
                known = ", ".join(sorted(book or {}, key=int))
                warnings.warn(
                    f"no schedule has {steps} steps (there are {known}): {scheduler.config.solver!r} is used",
                    stacklevel=4,
                )
            return
        made_for = made_for_guidance(entry["meta"])
        if made_for is not None and guidance is not None and made_for != guidance:
            warnings.warn(
                f"the schedule for {steps} steps was made at guidance {made_for:g}, "
                f"the pipeline runs at {guidance:g}",
                stacklevel=4,
            )


def _listed(schedules: Any) -> list[Any]:
    if schedules is None:
        return []
    if isinstance(schedules, str) and schedules in shipped_names():
        return list(shipped_schedules(schedules))
    if isinstance(schedules, (list, tuple)):
        if not schedules:
            raise ValueError("schedules is empty: give at least one, or None")
        return list(schedules)
    return [schedules]


def _loaded(each: Any) -> SolverSchedule:
    if isinstance(each, SolverSchedule):
        return each
    if isinstance(each, Mapping) or (isinstance(each, str) and each.lstrip().startswith("{")):
        return SolverSchedule.from_json(each)
    if isinstance(each, (str, os.PathLike)):
        return SolverSchedule.load(each)
    raise ValueError(
        f"{each!r} is no solver schedule: give a SolverSchedule, its JSON or the path of a file; ratios go "
        "into DCSolver(...)"
    )


def _distance(schedule: SolverSchedule, guidance: float | None) -> float:
    made_for = made_for_guidance(schedule.meta)
    return 0.0 if guidance is None or made_for is None else abs(made_for - guidance)


def _check_distinct(schedules: tuple[SolverSchedule, ...]) -> None:
    keys = [(schedule.nfe, made_for_guidance(schedule.meta)) for schedule in schedules]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"two schedules are for {key[0]} steps at guidance {key[1]}: leave one out")
