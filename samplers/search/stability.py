"""Whether a schedule can blow up: how much its table amplifies, and what it does on many noises.

A mean over a hundred pairs cannot see that one noise in five hundred ends in garbage. Weights that cancel
each other can do that: where data predictions swing from step to step, as with much guidance, differences of
large multiples of them are added up.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.table import DATA, SEEN, STATES, Row, SolverTable

__all__ = ["amplification", "blows_up"]

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
