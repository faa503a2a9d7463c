"""The timesteps or sigmas of a run: a row's list, or its rule for the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffplug.samplers.few_step.catalogue import Row

_TCD_POINTS = 50


@dataclass(frozen=True)
class Grid:
    """Where the network is evaluated; `argument`: "timesteps", "sigmas", empty for the scheduler's own."""

    argument: str
    values: tuple[float, ...]

    def given(self) -> list[Any]:
        """Return the list as schedulers and pipelines take it: whole timesteps as integers."""
        whole = self.argument == "timesteps" and all(v == int(v) for v in self.values)
        return [int(v) for v in self.values] if whole else list(self.values)


OWN = Grid("", ())


def grid_of(row: Row, steps: int) -> Grid:
    """Return the grid of a row for a number of evaluations, which need not be among its `steps`."""
    for argument in ("timesteps", "sigmas"):
        lists = getattr(row, argument)
        if steps in lists:
            return Grid(argument, lists[steps])
    if row.grid == "linspace":
        return Grid("sigmas", tuple(1.0 - j / steps for j in range(steps)))
    if row.grid == "trailing":
        return Grid("timesteps", trailing(steps))
    return Grid("timesteps", tcd(steps)) if row.grid == "tcd" else OWN


def is_free(row: Row) -> bool:
    """Whether a row serves numbers of steps between those it names: it has a rule and a range, no list."""
    return bool(row.grid) and not (row.timesteps or row.sigmas) and len(row.steps) > 1


def trailing(steps: int, train: int = 1000) -> tuple[float, ...]:
    """Return round(T - j T / n) - 1, j = 0 ... n - 1: the ends of n equal pieces, T - 1 first."""
    return tuple(float(round(train - j * train / steps) - 1) for j in range(steps))


def tcd(steps: int) -> tuple[float, ...]:
    """Return n of the 50 timesteps 20 i - 1, as TCD and LCM choose them; all trailing ones beyond 50."""
    if steps > _TCD_POINTS:
        return trailing(steps)
    places = [math.floor(j * _TCD_POINTS / steps) for j in range(steps)]
    return tuple(float(20 * (_TCD_POINTS - place) - 1) for place in places)
