"""The rungs of a search, each better than the one below where the data allow: ratios, grid, coefficients.

Every rung takes a problem and a schedule and gives a schedule; whether it is taken is decided elsewhere, on
pairs that no rung has seen. None needs a gradient of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp, ipndm, res_multistep, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta
from diffplug.samplers.search.fit import fit, simplex
from diffplug.samplers.search.problem import Problem, errors
from diffplug.samplers.search.schedule_numbers import Numbers, Times

__all__ = ["Watch", "coefficients", "corrector_policies", "grid", "multistep", "ratios", "regressed"]

Floats = npt.NDArray[np.float64]
Watch = Callable[[SolverSchedule], None]
"""Told every schedule that a fit passes through, so that the best on other pairs can be kept."""

RATIO_GRID = tuple(tenths / 10 for tenths in range(4, 19))
LOWEST_RATIO, HIGHEST_RATIO = 0.3, 2.0


def corrector_policies(steps: int, nodes: Nodes, times: Sequence[float]) -> list[SolverSchedule]:
    """UniPC-2 with a corrector everywhere, not after the first step, in the second half of time, nowhere.

    times: of the N nodes. A full corrector hurts at large guidance (arXiv 2310.13268).
    """
    early = [i for i, time in enumerate(times) if time > times[0] / 2]
    policies: list[Collection[int]] = [(), (0,), early, range(steps)]
    return [unipc(steps, nodes, disable_corrector=tuple(policy)) for policy in policies]


def multistep(steps: int, nodes: Nodes) -> list[SolverSchedule]:
    """Samplers without a corrector on these nodes: what the rungs above the ratios start from."""
    return [dpmpp(steps, nodes), res_multistep(steps, nodes), ipndm(steps, nodes, order=3)]


def best(problem: Problem, schedules: Iterable[SolverSchedule]) -> SolverSchedule:
    """The schedule with the smallest mean loss."""
    return min(schedules, key=lambda schedule: errors(problem, schedule).mean_loss)


def ratios(
    problem: Problem, schedule: SolverSchedule, *, iterations: int = 6, watch: Watch | None = None
) -> SolverSchedule:
    """DC-Solver's compensation ratios (arXiv 2409.03755), found step by step and then together.

    Step by step: the ratio whose (corrected) next state lies nearest to the converged one, from a grid and
    two parabolas, everything before it fixed. Together: least squares on the final samples. The ratios stay
    in 0.3 to 2.
    """
    first = schedule.compensation[0]
    free = list(range(first, len(schedule.steps)))
    if not free:
        return schedule
    start = _greedy_ratios(problem, with_ratios(schedule, dict.fromkeys(free, 1.0)), free)
    if watch is not None:
        watch(start)

    def made(theta: Floats) -> SolverSchedule:
        return with_ratios(schedule, dict(zip(free, theta.tolist(), strict=True)))

    found = fit(
        _residuals(problem, made),
        np.array([start.ratios[i] for i in free]),
        bounds=(LOWEST_RATIO, HIGHEST_RATIO),
        iterations=iterations,
        on_iterate=_watched(watch, made),
    )
    return best(problem, [start, made(found)])


def with_ratios(schedule: SolverSchedule, given: dict[int, float]) -> SolverSchedule:
    """The schedule with other ratios at some steps."""
    steps = [replace(step, ratio=given.get(i, step.ratio)) for i, step in enumerate(schedule.steps)]
    return replace(schedule, steps=tuple(steps))


def _greedy_ratios(problem: Problem, schedule: SolverSchedule, free: Sequence[int]) -> SolverSchedule:
    states = problem.truth_states(schedule)
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
    """The place of the lowest error: the best of a grid, then vertices of parabolas through three points."""
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
    ridge: float = 1e-5,
    iterations: int = 8,
    evaluations: int | None = None,
    watch: Watch | None = None,
) -> SolverSchedule:
    """Other nodes between the same ends: a simplex looks round, least squares on the final samples follow.

    evaluations: runs of the simplex, 15 for each node that can move by default. For schedules without a
    corrector: with one, uneven grids make rare but large errors at large guidance.
    """
    times, start = Times.of(problem, schedule)

    def made(theta: Floats) -> SolverSchedule:
        return replace(schedule, nodes=times.nodes(theta))

    seen = _watched(watch, made)
    near = simplex(
        lambda theta: errors(problem, made(theta)).mean_loss,
        start,
        evaluations=15 * len(start) if evaluations is None else evaluations,
        on_better=seen,
    )
    found = fit(
        _residuals(problem, made), near, step=2e-2, ridge=ridge, iterations=iterations, on_iterate=seen
    )
    return best(problem, [made(near), made(found)])


def coefficients(
    problem: Problem,
    schedule: SolverSchedule,
    *,
    states: bool = False,
    shifts: bool = False,
    nodes: bool = True,
    ridge: float = 1e-4,
    iterations: int = 8,
    watch: Watch | None = None,
) -> SolverSchedule:
    """Additions to every weight of every step, kept small by a ridge, together with the grid.

    A step may use all data predictions so far (arXiv 2502.17423), with `states` all earlier states too (arXiv
    2510.17699); with `shifts` the network is told other timesteps than the nodes'. Starts from a ridge
    regression of the converged states, step after step; then least squares on the final samples.
    """
    known = schedule.deltas is not None or schedule.first != "model"  # without D_0 there is no regression
    start = schedule if known else regressed(problem, schedule, ridge=ridge)
    if watch is not None:
        watch(start)
    times, shares = Times.of(problem, start)
    numbers = Numbers(start, times, shares, states, shifts, nodes)
    found = fit(
        _residuals(problem, numbers.write),
        numbers.read(),
        ridge=np.repeat([ridge, ridge, ridge, 1e-5], numbers.counts),
        iterations=iterations,
        on_iterate=_watched(watch, numbers.write),
    )
    return best(problem, [start, numbers.write(found)])


def regressed(
    problem: Problem, schedule: SolverSchedule, *, ridge: float = 1e-4, evaluations: int | None = None
) -> SolverSchedule:
    """Step after step, the additions to the weights of D_0..D_i that bring the next state nearest.

    Nearest to the converged one, in the mean square and up to a ridge. evaluations: of the converged run.
    Needs a prediction at the first node (`first="model"`); additions that are there already are replaced.
    """
    count, truth = len(schedule.steps), problem.truth_states(schedule, evaluations)
    deltas: list[Delta] = [Delta()] * count
    for i in range(count):
        run = problem.run(replace(schedule, deltas=tuple(deltas)))
        reached = run.final if i + 1 == count else run.states[i + 1]
        missing = (truth[i + 1] - reached).ravel()
        design = run.data[i::-1].reshape(i + 1, -1).T
        gram = design.T @ design / len(missing) + ridge * np.eye(i + 1)
        deltas[i] = Delta(tuple(np.linalg.solve(gram, design.T @ missing / len(missing)).tolist()))
    return replace(schedule, deltas=tuple(deltas))


def _residuals(problem: Problem, made: Callable[[Floats], SolverSchedule]) -> Callable[[Floats], Floats]:
    """Weighted differences from the truth: their squares sum up to the problem's mean loss."""

    def residuals(theta: Floats) -> Floats:
        return problem.loss.residuals(problem.final(made(theta)) - problem.truth)

    return residuals


def _watched(
    watch: Watch | None, made: Callable[[Floats], SolverSchedule]
) -> Callable[[Floats], None] | None:
    return None if watch is None else lambda theta: watch(made(theta))
