"""Schedules scored on growing parts of the same pairs; what is surely worse than a known one stops early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.metric import AGGREGATES, WORST, Metric
from diffplug.samplers.search.problem import Problem

__all__ = ["PairedComparison", "Scored", "p_value"]

Floats = npt.NDArray[np.float64]
SMALLEST = 16  # pairs in the first part
RESAMPLES, LEVEL = 199, 0.01


@dataclass(frozen=True)
class Scored:
    """What a schedule reached. value: lower the better. error: mean squared error of the final latents.

    marks: of the metric, for every pair that was run. pairs: how many those are; fewer than all for what was
    given up, whose value is then an estimate.
    """

    value: float
    error: float
    marks: Floats
    pairs: int


def p_value(candidate: Floats, known: Floats, aggregate: Callable[[Floats], Any], seed: int = 0) -> float:
    """How likely the candidate's marks [n] are so much worse than the known ones by chance alone.

    A permutation test of n pairs: were both schedules as good, each pair of marks could as well be the other
    way round. aggregate: over the last axis, lower the better.
    """
    swap = np.random.default_rng(seed).random((RESAMPLES, len(known))) < 0.5
    chance = aggregate(np.where(swap, known, candidate)) - aggregate(np.where(swap, candidate, known))
    seen = aggregate(candidate) - aggregate(known)
    return float((1 + (chance >= seen).sum()) / (1 + RESAMPLES))


@dataclass
class PairedComparison:
    """Scores schedules on a problem by a metric; the pairs are the same for all.

    prune: whether a schedule is given up once a permutation test at the level 0.01 finds it worse than the
    one it is held against, on a quarter or on half of the pairs. Only metrics with a number for each pair
    can do that. limit: the largest latent error that is allowed. spent: what scoring has cost so far, in
    schedules run on all pairs.
    """

    problem: Problem
    metric: Metric
    prune: bool = True
    limit: float = np.inf
    spent: float = 0.0
    _known: dict[SolverSchedule, Scored] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        n = len(self.problem.prompts)
        ends = (
            [end for end in (n // 4, n // 2) if end >= SMALLEST] if self.prune and self.metric.paired else []
        )
        self._parts = [self.problem.part(*at) for at in pairwise([0, *ends, n])] if ends else [self.problem]

    def score(self, schedule: SolverSchedule, against: SolverSchedule | None = None) -> Scored:
        """The schedule's score; against: another one, below which it need not be run to the end."""
        if schedule in self._known:
            return self._limited(self._known[schedule])
        bar = None if against is None or len(self._parts) == 1 else self.score(against)
        found = self._score(schedule, bar)
        if found.pairs == len(self.problem.reference):
            kept = found if self.metric.paired else replace(found, marks=np.zeros(0))
            self._known[schedule] = kept
        return self._limited(found)

    def _limited(self, found: Scored) -> Scored:
        over = found.error / self.limit
        return replace(found, value=WORST + over) if over > 1 and found.value < WORST else found

    def _score(self, schedule: SolverSchedule, bar: Scored | None) -> Scored:
        marks: list[Floats] = []
        off: list[Floats] = []
        for part in self._parts:
            final = part.final(schedule)
            off.append(np.square(final - part.reference).mean(axis=1))
            sound = np.isfinite(off[-1]).all()
            marks.append(self.metric.marks(part, final) if sound else np.full(len(final), np.inf))
            self.spent += len(final) / len(self.problem.reference)
            if not np.isfinite(marks[-1]).all():
                return Scored(WORST, np.inf, np.concatenate(marks), sum(map(len, off)))
            if bar is not None and part is not self._parts[-1] and self._worse(np.concatenate(marks), bar):
                break
        return self._told(np.concatenate(marks), np.concatenate(off), bar)

    def _worse(self, marks: Floats, bar: Scored) -> bool:
        aggregate = AGGREGATES[self.metric.aggregate]  # type: ignore[attr-defined]
        return p_value(marks, bar.marks[: len(marks)], aggregate) <= LEVEL

    def _told(self, marks: Floats, off: Floats, bar: Scored | None) -> Scored:
        error, pairs = float(off.mean()), len(off)
        if pairs < len(self.problem.reference) and bar is not None:
            aggregate = AGGREGATES[self.metric.aggregate]  # type: ignore[attr-defined]
            behind = float(aggregate(marks) - aggregate(bar.marks[:pairs]))
            return Scored(bar.value + max(behind, 0.0), error, marks, pairs)
        value = self.metric.value(self.problem, marks)
        return Scored(float(value) if np.isfinite(value) else WORST, error, marks, pairs)
