"""Schedules for several numbers of evaluations: each search begins with what the one before has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.schedule_search import search_schedule
from diffplug.samplers.search.schedules import ScheduleSearch

__all__ = ["ScheduleFront", "longer", "search_front"]


@dataclass(frozen=True)
class ScheduleFront:
    """Searches by their number of evaluations."""

    searches: Mapping[int, ScheduleSearch]

    @property
    def pareto(self) -> list[tuple[int, float]]:
        """(evaluations, value on the test pairs) of those that none with fewer evaluations equals."""
        best, found = np.inf, []
        for steps, search in sorted(self.searches.items()):
            value = (search.test or search.validation)["value"]
            if value < best:
                best = value
                found.append((steps, value))
        return found

    @property
    def schedules(self) -> list[SolverSchedule]:
        """The schedules, ready for `Solver(...)`."""
        return [search.schedule for _, search in sorted(self.searches.items())]


def search_front(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: Sequence[int],
    guidance_scale: float | None = None,
    *,
    on_search: Callable[[int], None] | None = None,
    **options: Any,
) -> ScheduleFront:
    """The best schedules of several numbers of evaluations, fewest first, each by `search_schedule`.

    A search begins with the winner of the one before, lengthened (S3 shares its population so). on_search:
    told the number whose turn it is. options: keywords of `search_schedule`. Raises ValueError as that does.
    """
    counts = sorted(set(num_inference_steps))
    if not counts:
        raise ValueError("no numbers of evaluations: give one or more, such as [4, 5, 6, 8]")
    found: dict[int, ScheduleSearch] = {}
    given = tuple(options.pop("seeds", ()))
    if idle := [each.nfe for each in given if each.nfe not in counts]:
        raise ValueError(
            f"a schedule to begin with has {idle[0]} evaluations, the searches are of "
            f"{', '.join(map(str, counts))}: leave it out, or search that number as well"
        )
    for steps in counts:
        if on_search is not None:
            on_search(steps)
        seeds = [*(each for each in given if each.nfe == steps)]
        seeds += [longer(search.schedule, steps) for search in list(found.values())[-1:]]
        found[steps] = search_schedule(pipe, prompts, steps, guidance_scale, seeds=seeds, **options)
    return ScheduleFront(found)


def longer(schedule: SolverSchedule, evaluations: int) -> SolverSchedule:
    """The schedule with so many evaluations, at least its own: the longest step is cut in two, and again.

    Nodes by name stay by name. Learned additions belong to one length and are left out.
    """
    found = replace(schedule, deltas=None, time_shift=None)
    while found.nfe < evaluations:
        lams = np.array(found.nodes.values if found.nodes.kind == "lambda" else [])
        gaps = np.diff(lams[np.isfinite(lams)])
        i = int(np.argmax(gaps)) if len(gaps) else max(0, len(found.steps) - 2)
        if len(gaps):
            middle = float(lams[i] + gaps[i] / 2)
            values = (*lams[: i + 1].tolist(), middle, *lams[i + 1 :].tolist())
            nodes = Nodes(kind="lambda", values=values)
        else:
            nodes = found.nodes
        steps = (*found.steps[: i + 1], *found.steps[i:])
        found = replace(found, nodes=nodes, steps=steps)
    return found
