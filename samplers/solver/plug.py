"""Solver: the plug that samples a pipeline with schedules of its own and puts the old scheduler back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from diffplug.intercept import Undo
from diffplug.messages import shown
from diffplug.samplers.fingerprint import check_origin
from diffplug.samplers.library import shipped_names, shipped_schedules
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.around_call import AroundCall
from diffplug.samplers.solver.attach import check_names, fitted, remade
from diffplug.samplers.solver.scheduler import CONSTRUCTOR, SolverScheduler
from diffplug.scheduler.plug import plugged_in


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
        SolverScheduler(**config, schedules=list(found) or None)
        object.__setattr__(self, "schedules", found)
        object.__setattr__(self, "config", MappingProxyType(dict(config)))

    def __reduce__(self) -> Any:
        return remade, (type(self), {"schedules": self.schedules}, dict(self.config))

    def scheduler_for(self, pipe: Any) -> SolverScheduler:
        """A new scheduler for the pipeline's model; the pipeline is left alone."""
        schedules = list(self.schedules) or None
        scheduler: SolverScheduler = fitted(SolverScheduler, pipe, **self.config, schedules=schedules)
        return scheduler

    def attach(self, pipe: Any) -> Undo:
        """Replace `pipe.scheduler`; returns the function that puts the very same object back."""
        scheduler = self.scheduler_for(pipe)
        check_origin("schedule", (schedule.meta for schedule in self.schedules), pipe)
        return plugged_in(pipe, scheduler, AroundCall())


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
        f"{shown(each)} is no solver schedule: give a SolverSchedule, its JSON or the path of a file; ratios "
        "go into DCSolver(...)"
    )
