"""Schedules for several numbers of evaluations: each search begins with what the one before has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.decisions.starts import longer
from diffplug.samplers.search.result import SearchResult
from diffplug.samplers.search.search import search_schedule

__all__ = ["SearchFront", "search_front"]


@dataclass(frozen=True)
class SearchFront:
    """Searches by their number of evaluations."""

    searches: Mapping[int, SearchResult]

    @property
    def pareto(self) -> list[tuple[int, float]]:
        """(evaluations, value on the test pairs) of those that none with fewer evaluations equals."""
        best, found = np.inf, []
        for steps, each in sorted(self.searches.items()):
            value = (each.test or each.validation)["value"]
            if value < best:
                best = value
                found.append((steps, value))
        return found

    @property
    def schedules(self) -> list[SolverSchedule]:
        """The schedules, ready for `Solver(...)`."""
        return [each.schedule for _, each in sorted(self.searches.items())]


def search_front(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: Sequence[int],
    guidance_scale: float | None = None,
    *,
    on_search: Callable[[int], None] | None = None,
    find: Callable[..., SearchResult] = search_schedule,
    **options: Any,
) -> SearchFront:
    """Return the best schedules of several numbers of evaluations, fewest first, each by `search_schedule`.

    A search begins with the winner of the one before, lengthened (S3 shares its population so). on_search:
    called with the number whose turn it is. find: what searches. options: its keywords. Raises ValueError as
    that does.
    """
    counts = sorted(set(num_inference_steps))
    if not counts:
        raise ValueError("no numbers of evaluations: give one or more, such as [4, 5, 6, 8]")
    found: dict[int, SearchResult] = {}
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
        seeds += [longer(each.schedule, steps) for each in list(found.values())[-1:]]
        found[steps] = find(pipe, prompts, steps, guidance_scale, seeds=seeds, **options)
    return SearchFront(found)
