"""Whether one schedule is better than another, and sound: paired scores, amplification, rare noises.

Schedules are scored on growing parts of the same pairs; what is surely worse than a known one stops early. A
mean over a hundred pairs cannot see that one noise in five hundred ends in garbage. Weights that cancel each
other can do that: where data predictions swing from step to step, as with much guidance, differences of large
multiples of them are added up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.metric import AGGREGATES, WORST, Metric
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.table import DATA, SEEN, STATES, Row, SolverTable

__all__ = ["PairedComparison", "Scored", "amplification", "blows_up", "p_value"]

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


Shares = dict[int, float]
START = -1  # in shares: the noise that a run starts from
USUAL, FARTHER = (
    0.98,
    1.5,
)  # a sample so much larger than the usual ones of a known solver is none of the data


def amplification(schedule: SolverSchedule, levels: NoiseLevels) -> float | None:
    """Return how far data predictions are multiplied on their way into a state, 1 for DDIM.

    Every state is a sum of weights times data predictions and the noise. It is the sum of absolute weights of
    the predictions over the size of the state, hypot(alpha, sigma), the largest over all states. None for a
    schedule that stands on statistics of a model.
    """
    if schedule.needs_statistics:
        return None
    table = compile_schedule(schedule, levels)
    sizes = [math.hypot(level.alpha, level.sigma) for level in table.levels[1:]]
    sums = [sum(abs(w) for node, w in state.items() if node != START) for state in _states(table)]
    return max(one / size for one, size in zip(sums, sizes, strict=True))


def _states(table: SolverTable) -> list[Shares]:
    """Return each state as shares of the data predictions as the network gave them, and of the noise."""
    found: list[Shares] = []
    histories: tuple[list[Shares], ...] = ([], [], [])
    state: Shares = {START: 1.0}
    for i, step in enumerate(table.steps):
        data = {START: table.first.gain} if table.first is not None and i == 0 else {i: 1.0}
        for kind, entry in ((DATA, data), (STATES, state), (SEEN, state)):
            histories[kind].append(dict(entry))
        if step.correct is not None:
            histories[STATES][-1] = _sum(step.correct, histories)
        if step.compensate is not None:
            histories[DATA][-1] = _sum(step.compensate, histories)
        state = _sum(step.predict, histories)
        found.append(state)
    return found


def _sum(row: Row, histories: tuple[list[Shares], ...]) -> Shares:
    total: Shares = defaultdict(float)
    for term in row:
        for node, share in histories[term.history][term.back].items():
            total[node] += float(term.weight) * share
    return dict(total)


def blows_up(problem: Problem, schedule: SolverSchedule, known: SolverSchedule) -> bool:
    """Whether a schedule sends more noises to where hardly a sample of a known one is than that one does.

    No converged result is needed: a sample is too far when its root mean square is 1.5 times that of the
    known schedule's, the largest fiftieth left aside. As many as the known one has are forgiven.
    """
    ours, theirs = (np.sqrt(np.square(problem.final(each)).mean(axis=1)) for each in (schedule, known))
    limit = FARTHER * np.nanquantile(theirs, USUAL)
    return bool((~(ours <= limit)).sum() > (~(theirs <= limit)).sum())
