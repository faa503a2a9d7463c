"""Fits of a schedule's numbers from runs alone: ratios, grid, weights, all of them. None needs a gradient.

Every fit takes a problem and a schedule and gives a schedule; whether it is kept is decided elsewhere, on
pairs that no fit has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp, ipndm, res_multistep, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta, SolverStep
from diffplug.samplers.search.least_squares import fit, simplex
from diffplug.samplers.search.parameters import Parameters, explicit, with_ratios
from diffplug.samplers.search.problem import Problem, Run, errors

__all__ = [
    "Metered",
    "Spent",
    "Watch",
    "best",
    "coefficients",
    "corrector_policies",
    "fitted",
    "grid",
    "multistep",
    "ratios",
    "refine",
    "regressed",
]

Floats = npt.NDArray[np.float64]
Watch = Callable[[SolverSchedule], None]
"""Called with every schedule that a fit passes through, so that the best on other pairs can be kept."""

RATIO_GRID = tuple(tenths / 10 for tenths in range(4, 19))
LOWEST_RATIO, HIGHEST_RATIO = 0.3, 2.0


class Spent(Exception):
    """Ends a fit that has used what it may."""


@dataclass
class Metered:
    """A problem whose runs are counted, and end with `Spent` above a limit; else it is the problem."""

    problem: Problem
    limit: float = np.inf
    used: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.problem, name)

    @property
    def left(self) -> float:
        return self.limit - self.used

    def pay(self, runs: int = 1) -> None:
        if self.used + runs > self.limit:
            raise Spent
        self.used += runs

    def final(self, schedule: SolverSchedule) -> Floats:
        self.pay()
        return self.problem.final(schedule)

    def run(self, schedule: SolverSchedule) -> Run:
        self.pay()
        return self.problem.run(schedule)

    @contextmanager
    def at_most(self, runs: float) -> Iterator[None]:
        """A block that ends early, without an error, once so many more runs are used."""
        before, self.limit = self.limit, min(self.limit, self.used + runs)
        try:
            with suppress(Spent):
                yield
        finally:
            self.limit = before


def corrector_policies(steps: int, nodes: Nodes, times: Sequence[float]) -> list[SolverSchedule]:
    """Return UniPC-2 with a corrector everywhere, not after step 0, in the second half of time, nowhere.

    times: of the N nodes. A full corrector hurts at large guidance (arXiv 2310.13268).
    """
    early = [i for i, time in enumerate(times) if time > times[0] / 2]
    policies: list[Collection[int]] = [(), (0,), early, range(steps)]
    return [unipc(steps, nodes, disable_corrector=tuple(policy)) for policy in policies]


def multistep(steps: int, nodes: Nodes) -> list[SolverSchedule]:
    """Return samplers without a corrector on these nodes: what the stages above the ratios start from."""
    return [dpmpp(steps, nodes), res_multistep(steps, nodes), ipndm(steps, nodes, order=3)]


def best(problem: Problem, schedules: Iterable[SolverSchedule]) -> SolverSchedule:
    """Return the schedule with the smallest mean loss."""
    return min(schedules, key=lambda schedule: errors(problem, schedule).mean_loss)


def fitted(
    problem: Problem,
    schedule: SolverSchedule,
    names: Sequence[str],
    *,
    iterations: int,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    start: Floats | None = None,
    watch: Watch | None = None,
    losses: list[float] | None = None,
) -> SolverSchedule:
    """Return the schedule whose named blocks of numbers are fitted to the reference by least squares.

    start: where they begin, default as they are. losses: the mean loss of every point tried is added to it.
    Numbers that no schedule can have, as nodes that ran into each other, count as very bad ones.
    """
    numbers = Parameters(schedule, names)

    def residuals(theta: Floats) -> Floats:
        try:
            off = problem.final(numbers.write(theta)) - problem.reference
        except ValueError:
            off = np.full_like(problem.reference, 1e3)
        found = problem.loss.residuals(off)
        if losses is not None:
            losses.append(float(found @ found))
        return found

    found = fit(
        residuals,
        numbers.read() if start is None else start,
        step=numbers.steps,
        ridge=numbers.ridge if np.isinf(bounds[1]) else 0.0,
        bounds=bounds,
        iterations=iterations,
        on_iterate=None if watch is None else lambda theta: watch(numbers.write(theta)),
    )
    return numbers.write(found)


def ratios(
    problem: Problem, schedule: SolverSchedule, *, iterations: int = 6, watch: Watch | None = None
) -> SolverSchedule:
    """Return DC-Solver's compensation ratios (arXiv 2409.03755), found step by step and then together.

    Step by step: the ratio whose (corrected) next state lies nearest to the converged one, from a grid and
    two parabolas, everything before it fixed. Together: least squares on the final samples. The ratios stay
    in 0.3 to 2.
    """
    free = list(range(schedule.compensation[0], len(schedule.steps)))
    if not free:
        return schedule
    start = _greedy_ratios(problem, with_ratios(schedule, dict.fromkeys(free, 1.0)), free)
    if watch is not None:
        watch(start)
    limits = (LOWEST_RATIO, HIGHEST_RATIO)
    found = fitted(problem, start, ("ratios",), iterations=iterations, bounds=limits, watch=watch)
    return best(problem, [start, found])


def _greedy_ratios(problem: Problem, schedule: SolverSchedule, free: Sequence[int]) -> SolverSchedule:
    states = problem.reference_states(schedule)
    for i in free:

        def error(ratio: float, i: int = i, schedule: SolverSchedule = schedule) -> float:
            run = problem.run(with_ratios(schedule, {i: ratio}))
            reached = run.final if i + 1 == len(schedule.steps) else run.states[i + 1]
            off = np.square(reached - states[i + 1]).mean(axis=1)
            value = float(problem.loss(off).mean())
            return value if np.isfinite(value) else np.inf

        schedule = with_ratios(schedule, {i: _lowest(error, RATIO_GRID)})
    return schedule


def _lowest(error: Callable[[float], float], grid: Sequence[float], refinements: int = 2) -> float:
    """Return the place of the lowest error: the best of a grid, then vertices of parabolas."""
    known = {x: error(x) for x in grid}
    for _ in range(refinements):
        places = sorted(known)
        here = min(places, key=lambda x: known[x])
        k = places.index(here)
        if not 0 < k < len(places) - 1:
            break
        x, y = np.array(places[k - 1 : k + 2]), np.array([known[p] for p in places[k - 1 : k + 2]])
        curve = np.polyfit(x, y, 2)
        vertex = float(-curve[1] / (2 * curve[0])) if curve[0] > 0 else here
        if not x[0] < vertex < x[2] or vertex in known:
            break
        known[vertex] = error(vertex)
    return min(known, key=lambda x: known[x])


def grid(
    problem: Problem,
    schedule: SolverSchedule,
    *,
    iterations: int = 8,
    evaluations: int | None = None,
    watch: Watch | None = None,
) -> SolverSchedule:
    """Return other nodes between the same ends: a simplex explores, least squares on final samples follow.

    evaluations: runs of the simplex, 15 for each node that can move by default. For schedules without a
    corrector: with one, uneven grids make rare but large errors at large guidance.
    """
    numbers = Parameters(explicit(schedule, problem.levels, "time"), ("grid",))
    start = numbers.read()
    near = simplex(
        lambda theta: errors(problem, numbers.write(theta)).mean_loss,
        start,
        evaluations=15 * len(start) if evaluations is None else evaluations,
        on_better=None if watch is None else lambda theta: watch(numbers.write(theta)),
    )
    moved = numbers.write(near)
    found = fitted(problem, moved, ("grid",), iterations=iterations, watch=watch)
    return best(problem, [moved, found])


def coefficients(
    problem: Problem,
    schedule: SolverSchedule,
    *,
    states: bool = False,
    iterations: int = 8,
    watch: Watch | None = None,
) -> SolverSchedule:
    """Return additions to every weight of every step, kept small by a ridge, together with the grid.

    A step may use all data predictions so far (arXiv 2502.17423), with `states` all earlier states too, and
    the network is told other timesteps than the nodes' (arXiv 2510.17699). Starts from a ridge regression of
    the converged states, step after step; then least squares on the final samples.
    """
    known = schedule.deltas is not None or schedule.first != "model"  # without D_0 there is no regression
    start = schedule if known else regressed(problem, schedule)
    if watch is not None:
        watch(start)
    names = ("weights", "states", "shifts", "grid") if states else ("weights", "grid")
    timed = explicit(start, problem.levels, "time")
    return best(problem, [start, fitted(problem, timed, names, iterations=iterations, watch=watch)])


def regressed(
    problem: Problem, schedule: SolverSchedule, *, ridge: float = 1e-4, evaluations: int | None = None
) -> SolverSchedule:
    """Return, step after step, the additions to the weights of D_0..D_i that bring the next state nearest.

    Nearest to the converged one, in the mean square and up to a ridge. evaluations: of the converged run.
    Needs a prediction at the first node (`first="model"`); additions that are there already are replaced.
    """
    count, truth = len(schedule.steps), problem.reference_states(schedule, evaluations)
    deltas: list[Delta] = [Delta()] * count
    for i in range(count):
        run = problem.run(replace(schedule, deltas=tuple(deltas)))
        reached = run.final if i + 1 == count else run.states[i + 1]
        missing = (truth[i + 1] - reached).ravel()
        design = run.data[i::-1].reshape(i + 1, -1).T
        gram = design.T @ design / len(missing) + ridge * np.eye(i + 1)
        deltas[i] = Delta(tuple(np.linalg.solve(gram, design.T @ missing / len(missing)).tolist()))
    return replace(schedule, deltas=tuple(deltas))


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
