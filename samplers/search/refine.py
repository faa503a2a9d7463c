"""Fits of all real numbers of a schedule at once, within a number of runs: what follows the decisions.

Grid, relaxations, mixtures of prediction types and DC-Solver's compensation ratios, and with all of them the
weights of every step (arXiv 2502.17423).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import SolverStep
from diffplug.samplers.search.fits import Metered, Watch, fitted, regressed
from diffplug.samplers.search.least_squares import simplex
from diffplug.samplers.search.parameters import Parameters, explicit
from diffplug.samplers.search.problem import Problem, errors

__all__ = ["STAGES", "refine"]

LOOK = 0.3  # the share of the runs in which a simplex explores other nodes,
LEAST_LOOK = 3  # and how many it needs for each of them to be of use
ENOUGH = 0.7  # a step down that leaves more of the loss is a small one;
TRIES = 2  # more than one length is tried
FINER = 10  # steps of the converged run for each of the schedule's, in a regression
STAGES = (("grid", "weights"), ("grid", "relaxations", "mixtures", "ratios", "weights"))
"""What is fitted together: the table that the decisions make on their grid, then everything there is."""


def refine(
    problem: Problem,
    schedule: SolverSchedule,
    *,
    score: Callable[[SolverSchedule], float],
    evaluations: int,
    stages: Sequence[Sequence[str]] = STAGES,
    iterations: int = 16,
    on_better: Callable[[SolverSchedule, int], None] | None = None,
) -> tuple[SolverSchedule, int]:
    """Return the schedule with the lowest score that the fits pass through, and how many runs they took.

    They lower the problem's loss (Levenberg-Marquardt, arXiv 2409.03755 for the ratios); `score`, on other
    pairs, decides what is kept. Where the first step down wins little, least squares are at the wrong place,
    as when pictures tip over into others: then regressions on converged states propose weights (`regressed`;
    not for schedules with an analytic first step), on the decisions as they are and on first-order steps, and
    a simplex explores other nodes, for which weights are proposed again. Each stage begins at the best so far
    and gets the same share of the runs that are left, of which there are at most `evaluations` in all: where
    they are too few for one step of every stage, the first gets all of them. on_better: called with every new
    best one, and the runs so far.
    """
    meter, best = Metered(problem, evaluations), schedule
    known = {best: score(best)}

    def watch(passed: SolverSchedule) -> None:
        nonlocal best
        if passed not in known:
            known[passed] = score(passed)
        if known[passed] < known[best]:
            best = passed
            if on_better is not None:
                on_better(best, meter.used)

    begin = explicit(best, problem.levels)
    costs = [2 + sum(Parameters(begin, names).counts) for names in stages]  # of one step down: differences
    look, least = int(LOOK * evaluations), LEAST_LOOK * sum(Parameters(begin, ("grid",)).counts)
    if schedule.first == "model" and least <= look <= evaluations - 2 * costs[0]:
        losses: list[float] = []
        with meter.at_most(costs[0] + TRIES):
            fitted(meter, begin, stages[0], iterations=2 + TRIES, watch=watch, losses=losses)
        if losses and min(losses) > ENOUGH * losses[0]:
            kept = costs[0]  # the runs of one step down from what is found here
            for each in dict.fromkeys((replace(begin, deltas=None), _plain(begin))):
                _propose(meter, each, kept, watch)
            start = replace(explicit(best, problem.levels), deltas=None)
            look = int(min(look, meter.left - kept - _proposal_cost(start)))
            if least <= look:
                _propose(meter, _explored(meter, start, look, score), costs[0], watch)
    if max(costs) > meter.left // len(stages):
        stages = stages[:1]
    for left, names in zip(range(len(stages), 0, -1), stages, strict=True):
        with meter.at_most(meter.left // left):
            fitted(meter, explicit(best, problem.levels), names, iterations=iterations, watch=watch)
    return best, meter.used


def _plain(schedule: SolverSchedule) -> SolverSchedule:
    """Return first-order steps on the same nodes: with few pairs it matters what weights are added to."""
    return replace(schedule, steps=(SolverStep(),) * len(schedule.steps), deltas=None, statistics=None)


def _proposal_cost(schedule: SolverSchedule) -> int:
    return len(schedule.steps) + FINER


def _propose(meter: Metered, schedule: SolverSchedule, kept: int, watch: Watch) -> None:
    """Show `watch` the weights of a regression, where it leaves `kept` runs."""
    cost = _proposal_cost(schedule)
    if cost > meter.left - kept:
        return
    meter.pay(cost)
    bare = replace(schedule, deltas=None)
    with suppress(ValueError, np.linalg.LinAlgError):  # states that are not finite
        watch(regressed(meter.problem, bare, evaluations=FINER * len(schedule.steps)))


def _explored(
    meter: Metered, schedule: SolverSchedule, runs: int, score: Callable[[SolverSchedule], float]
) -> SolverSchedule:
    """Return the schedule with the lowest score that a simplex over the nodes has passed."""
    numbers, passed = Parameters(schedule, ("grid",)), [schedule]

    def value(theta: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        try:
            return errors(meter, numbers.write(theta)).mean_loss
        except ValueError:  # nodes that ran into each other
            return np.inf

    with meter.at_most(runs):
        simplex(
            value,
            numbers.read(),
            evaluations=runs,
            on_better=lambda theta: passed.append(numbers.write(theta)),
        )
    return min(passed, key=score)
