"""Fits of all real numbers of a schedule at once, through the sampler as it is: no gradient needed.

What a search over decisions leaves: the grid, relaxations, mixtures of prediction types and DC-Solver's
compensation ratios, and after those the weights of every step (arXiv 2502.17423).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta, Derivative, Linear, Scale, SolverStep
from diffplug.samplers.search.fit import fit, simplex
from diffplug.samplers.search.loss import SQUARED, Loss
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.search.rungs import regressed

__all__ = ["BLOCKS", "STAGES", "Block", "explicit", "refine"]

Floats = npt.NDArray[np.float64]
NO_SIGNAL = -8.0  # the lambda below which noise predictions say nothing
LOOK = 0.3  # the share of the runs in which a simplex looks round for other nodes,
LEAST_LOOK = 3  # and how many it needs for each of them to be of use
ENOUGH = 0.7  # a step down that leaves more of the loss is a small one;
TRIES = 2  # more than one length is tried
FINER = 10  # steps of the converged run for each of the schedule's, in a regression


@dataclass(frozen=True)
class Block:
    """Some real numbers of a schedule: read, written, the step of their differences, a ridge's weight."""

    read: Callable[[SolverSchedule], Floats]
    write: Callable[[SolverSchedule, Floats], SolverSchedule]
    step: float = 1e-2
    ridge: float = 1e-4


def explicit(schedule: SolverSchedule, levels: NoiseLevels) -> SolverSchedule:
    """The schedule with its nodes as lambdas."""
    sigmas = schedule.nodes.sigmas(levels, len(schedule.steps))
    lams = [np.inf if sigma == 0 else levels.level(float(sigma)).lam for sigma in sigmas]
    return replace(schedule, nodes=Nodes(kind="lambda", values=tuple(lams)))


def _read_grid(schedule: SolverSchedule) -> Floats:
    """Logarithms of the steps in lambda: over the last one where both ends are fixed."""
    lams = np.array([lam for lam in schedule.nodes.values if np.isfinite(lam)])
    logs = np.log(np.diff(lams))
    return logs if schedule.nodes.ends_clean else logs[:-1] - logs[-1]


def _write_grid(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    lams = schedule.nodes.values
    if schedule.nodes.ends_clean:
        new = [lams[0], *(lams[0] + np.cumsum(np.exp(theta))).tolist(), np.inf]
    else:
        shares = np.exp(np.append(theta, 0.0) - max(0.0, theta.max(initial=0.0)))
        inner = lams[0] + np.cumsum(shares / shares.sum())[:-1] * (lams[-1] - lams[0])
        new = [lams[0], *inner.tolist(), lams[-1]]
    return replace(schedule, nodes=Nodes(kind="lambda", values=tuple(new)))


def _relaxed(schedule: SolverSchedule) -> list[int]:
    """Steps whose first derivative has a linear relaxation or none."""
    steps = enumerate(schedule.steps)
    return [
        i
        for i, s in steps
        if s.predict.order > 1 and s.predict.derivatives[0].scale.kind in ("none", "linear")
    ]


def _read_relaxations(schedule: SolverSchedule) -> Floats:
    return np.array([schedule.steps[i].predict.derivatives[0].scale.c for i in _relaxed(schedule)])


def _write_relaxations(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    def changed(step: SolverStep, c: float) -> SolverStep:
        first, *rest = step.predict.derivatives
        scaled = Derivative(first.points, Scale("linear", c) if c else Scale())
        return replace(step, predict=replace(step.predict, derivatives=(scaled, *rest)))

    return _changed(schedule, _relaxed(schedule), theta, changed)


def _mixed(schedule: SolverSchedule) -> list[int]:
    """Steps that may mix noise and data predictions: with signal at the start and noise at the end."""
    last = len(schedule.steps) - 1
    return [
        i
        for i, step in enumerate(schedule.steps)
        if step.param != "ems"
        and schedule.nodes.values[i] > NO_SIGNAL
        and not (i == last and schedule.nodes.ends_clean)
    ]


def _read_mixtures(schedule: SolverSchedule) -> Floats:
    params = [schedule.steps[i].param for i in _mixed(schedule)]
    return np.array([p.l if isinstance(p, Linear) else float(p == "data") for p in params])


def _write_mixtures(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    def changed(step: SolverStep, mix: float) -> SolverStep:
        named = {1.0: "data", 0.0: "noise"}.get(mix)
        return replace(step, param=named or Linear(mix, mix - 1.0))

    return _changed(schedule, _mixed(schedule), theta, changed)


def _compensated(schedule: SolverSchedule) -> list[int]:
    return list(range(schedule.compensation[0], len(schedule.steps)))


def _read_ratios(schedule: SolverSchedule) -> Floats:
    return np.array([schedule.ratios[i] for i in _compensated(schedule)])


def _write_ratios(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    return _changed(schedule, _compensated(schedule), theta, lambda step, r: replace(step, ratio=r))


def _changed(
    schedule: SolverSchedule,
    places: Sequence[int],
    theta: Floats,
    change: Callable[[SolverStep, float], SolverStep],
) -> SolverSchedule:
    steps = list(schedule.steps)
    for i, value in zip(places, theta.tolist(), strict=True):
        steps[i] = change(steps[i], value)
    return replace(schedule, steps=tuple(steps))


def _weights(schedule: SolverSchedule) -> list[tuple[int, int]]:
    """(step, evaluation counted back) of every weight of a data prediction."""
    return [(i, k) for i in range(len(schedule.steps)) for k in range(i + 1)]


def _read_weights(schedule: SolverSchedule) -> Floats:
    deltas = schedule.deltas or (None,) * len(schedule.steps)
    rows = [(delta or Delta()).data for delta in deltas]
    return np.array([rows[i][k] if k < len(rows[i]) else 0.0 for i, k in _weights(schedule)])


def _write_weights(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    ends = np.cumsum([i + 1 for i in range(len(schedule.steps))])
    deltas = tuple(Delta(tuple(part.tolist())) for part in np.split(theta, ends[:-1]))
    return replace(schedule, deltas=deltas)


BLOCKS = {
    "grid": Block(_read_grid, _write_grid, step=2e-2, ridge=1e-5),
    "relaxations": Block(_read_relaxations, _write_relaxations),
    "mixtures": Block(_read_mixtures, _write_mixtures),
    "ratios": Block(_read_ratios, _write_ratios),
    "weights": Block(_read_weights, _write_weights),
}
STAGES = (("grid", "weights"), ("grid", "relaxations", "mixtures", "ratios", "weights"))
"""What is fitted together: the table that the decisions make on their grid, then everything there is."""


class _Spent(Exception):
    """Ends a fit that has used what it may."""


def refine(
    problem: Problem,
    schedule: SolverSchedule,
    *,
    score: Callable[[SolverSchedule], float],
    evaluations: int,
    loss: Loss = SQUARED,
    stages: Sequence[Sequence[str]] = STAGES,
    iterations: int = 16,
    on_better: Callable[[SolverSchedule, int], None] | None = None,
) -> tuple[SolverSchedule, int]:
    """The schedule with the lowest score that the fits pass through, and how many runs they took.

    The distance of final samples from the truth is what they lower, squared or as `loss` counts it
    (Levenberg-Marquardt, arXiv 2409.03755 for the ratios); `score`, on other pairs, decides what is kept.
    Where the first step down wins little, least squares are at the wrong place, as when pictures tip over
    into others: then regressions on converged states propose weights (`regressed`; not for schedules with an
    analytic first step), on the decisions as they are and on first-order steps, and a simplex looks round for
    other nodes, for which weights are proposed again. Each stage begins at the best so far and gets the same
    share of the runs that are left, of which there are at most `evaluations` in all: where they are too few
    for one step of every stage, the first gets all of them. on_better: told every new best one, and the runs
    so far.
    """
    best, used = schedule, 0
    known = {best: score(best)}

    def watch(passed: SolverSchedule, runs: int) -> None:
        nonlocal best
        if passed not in known:
            known[passed] = score(passed)
        if known[passed] < known[best]:
            best = passed
            if on_better is not None:
                on_better(best, used + runs)

    begin = explicit(best, problem.levels)
    costs = [_step_cost(begin, names) for names in stages]
    look, least = int(LOOK * evaluations), LEAST_LOOK * len(_read_grid(begin))
    if schedule.first == "model" and least <= look <= evaluations - 2 * costs[0]:
        runs, gain = _stage(problem, loss, begin, stages[0], costs[0] + TRIES, 2 + TRIES, watch)
        used += runs
        if gain > ENOUGH:
            kept = costs[0]  # the runs of one step down from what is found here
            for each in dict.fromkeys((replace(begin, deltas=None), _plain(begin))):
                used += _proposed(problem, each, evaluations - used - kept, watch)
            start = replace(explicit(best, problem.levels), deltas=None)
            kept += _proposal_cost(start)
            if least <= (look := min(look, evaluations - used - kept)):
                runs, found = _look_round(problem, loss, start, look, score)
                used += runs + _proposed(problem, found, evaluations - used - runs - costs[0], watch)
    if max(costs) > (evaluations - used) // len(stages):
        stages = stages[:1]
    for left, names in zip(range(len(stages), 0, -1), stages, strict=True):
        start = explicit(best, problem.levels)
        used += _stage(problem, loss, start, names, (evaluations - used) // left, iterations, watch)[0]
    return best, used


def _plain(schedule: SolverSchedule) -> SolverSchedule:
    """First-order steps on the same nodes: with few pairs it matters what the weights are added to."""
    return replace(schedule, steps=(SolverStep(),) * len(schedule.steps), deltas=None, statistics=None)


def _proposal_cost(schedule: SolverSchedule) -> int:
    return len(schedule.steps) + FINER


def _proposed(
    problem: Problem,
    schedule: SolverSchedule,
    evaluations: int,
    watch: Callable[[SolverSchedule, int], None],
) -> int:
    """The runs that a regression took, 0 where there are not enough; `watch` is told what it proposes."""
    cost = _proposal_cost(schedule)
    if cost > evaluations:
        return 0
    bare = replace(schedule, deltas=None)
    with suppress(ValueError, np.linalg.LinAlgError):  # states that are not finite
        watch(regressed(problem, bare, evaluations=FINER * len(schedule.steps)), cost)
    return cost


def _look_round(
    problem: Problem,
    loss: Loss,
    schedule: SolverSchedule,
    evaluations: int,
    score: Callable[[SolverSchedule], float],
) -> tuple[int, SolverSchedule]:
    """(the runs of a simplex over the nodes, that of its steps down which has the lowest score)."""
    used, passed = 0, [schedule]

    def value(theta: Floats) -> float:
        nonlocal used
        used += 1
        try:
            off = problem.final(_write_grid(schedule, theta)) - problem.truth
        except ValueError:  # nodes that ran into each other
            return np.inf
        return float(loss(np.square(off).mean(axis=1)).mean())

    simplex(
        value,
        _read_grid(schedule),
        evaluations=evaluations,
        on_better=lambda theta: passed.append(_write_grid(schedule, theta)),
    )
    return used, min(passed, key=score)


def _step_cost(schedule: SolverSchedule, names: Sequence[str]) -> int:
    """The runs that one step of a stage takes: where it begins, its differences, where it ends."""
    return 2 + sum(len(BLOCKS[name].read(schedule)) for name in names)


def _stage(
    problem: Problem,
    loss: Loss,
    schedule: SolverSchedule,
    names: Sequence[str],
    evaluations: int,
    iterations: int,
    watch: Callable[[SolverSchedule, int], None],
) -> tuple[int, float]:
    """(the runs that a fit of some blocks took, the smallest loss over the first one).

    `watch` is told every point passed, and the runs.
    """
    blocks = [BLOCKS[name] for name in names]
    reads = [block.read(schedule) for block in blocks]
    sizes = [len(read) for read in reads]
    where = list(pairwise(np.cumsum([0, *sizes]).tolist()))
    used = 0
    losses: list[float] = []

    def made(theta: Floats) -> SolverSchedule:
        found = schedule
        for block, (a, b) in zip(blocks, where, strict=True):
            found = block.write(found, theta[a:b])
        return found

    def residuals(theta: Floats) -> Floats:
        nonlocal used
        if used >= evaluations:
            raise _Spent
        used += 1
        try:
            off = problem.final(made(theta)) - problem.truth
        except ValueError:  # nodes that ran into each other, for one
            off = np.full_like(problem.truth, 1e3)
        found = loss.residuals(off)
        losses.append(float(found @ found))
        return found

    with suppress(_Spent):
        fit(
            residuals,
            np.concatenate(reads),
            step=np.repeat([block.step for block in blocks], sizes),
            ridge=np.repeat([block.ridge for block in blocks], sizes),
            iterations=iterations,
            on_iterate=lambda theta: watch(made(theta), used),
        )
    return used, min(losses) / losses[0] if losses and losses[0] > 0 else 1.0
