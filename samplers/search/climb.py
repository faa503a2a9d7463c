"""Rung after rung up to the best solver that the data allow; every one judged on pairs it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from diffplug.registry import unknown
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim, deis, dpmpp, ipndm, res_multistep, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search import rungs
from diffplug.samplers.search.problem import Errors, Problem, errors

__all__ = ["RUNGS", "Climb", "RungResult", "climb", "stock_schedules"]

RUNGS = ("ratios", "grid", "coefficients", "full")
"""What can be searched, from few numbers to many: each asks for more pairs than the one before."""

OTHER_GRIDS = ("karras", "log-snr", "beta57")


@dataclass(frozen=True)
class RungResult:
    """What a rung reached: its best schedule, errors on both sets of pairs, and what it cost.

    evaluations: of the network, each over all pairs of a set, both sets counted; seconds: wall clock.
    accepted: better than what was there, on held-out pairs.
    """

    name: str
    schedule: SolverSchedule
    train: dict[str, float]
    held_out: dict[str, float]
    evaluations: int
    seconds: float
    accepted: bool

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "schedule": self.schedule.to_json()}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> RungResult:
        return cls(**{**told, "schedule": SolverSchedule.from_json(told["schedule"])})


@dataclass(frozen=True)
class Climb:
    """The schedule that a search gives, and how it got there.

    stock: held-out errors of the stock solvers, by name; `baseline` is the best of them by the loss.
    """

    schedule: SolverSchedule
    rungs: tuple[RungResult, ...]
    stock: dict[str, dict[str, float]]

    @property
    def baseline(self) -> str:
        return min(self.stock, key=lambda name: self.stock[name]["mean_loss"])

    @property
    def improved(self) -> bool:
        """Whether any rung beat the best stock solver."""
        return any(rung.accepted for rung in self.rungs)


@dataclass
class _Leader:
    """The best schedule so far on held-out pairs, out of those that a rung passes through."""

    problem: Problem
    schedule: SolverSchedule | None = None
    errors: Errors = field(default_factory=lambda: Errors(np.array([np.inf])))

    def watch(self, schedule: SolverSchedule) -> None:
        found = errors(self.problem, schedule)
        if found.mean_loss < self.errors.mean_loss:
            self.schedule, self.errors = schedule, found


def stock_schedules(steps: int, nodes: Nodes) -> dict[str, SolverSchedule]:
    """The multistep solvers of Diffusers on these nodes, and the strongest on other grids, by name."""
    found = {
        "DDIM": ddim(steps, nodes),
        "DPM-Solver++ 2M": dpmpp(steps, nodes),
        "DPM-Solver++ 3M": dpmpp(steps, nodes, order=3),
        "UniPC-2": unipc(steps, nodes),
        "UniPC-3": unipc(steps, nodes, order=3),
        "DEIS-2": deis(steps, nodes),
        "DEIS-3": deis(steps, nodes, order=3),
        "iPNDM": ipndm(steps, nodes),
        "res_multistep": res_multistep(steps, nodes),
    }
    for other in _elsewhere(nodes):
        found[f"DPM-Solver++ 2M, {other.name}"] = dpmpp(steps, other)
        found[f"UniPC-2, {other.name}"] = unipc(steps, other)
    return found


def _elsewhere(nodes: Nodes) -> list[Nodes]:
    """Other grids with the same end."""
    final = "zero" if nodes.ends_clean else "sigma_min"
    return [Nodes(kind="name", name=name, final=final) for name in OTHER_GRIDS if name != nodes.name]


def climb(
    train: Problem,
    held_out: Problem,
    steps: int,
    nodes: Nodes,
    *,
    climbed: Sequence[str] = RUNGS,
    done: Sequence[RungResult] = (),
    on_rung: Callable[[RungResult], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Climb:
    """The best schedule of `steps` evaluations, and never one that is worse than the best stock solver.

    train: pairs that the numbers are fitted to. held_out: pairs that choose between candidates, and decide
    whether a rung is taken: its mean loss has to be smaller than the best so far, and neither mean nor 95th
    percentile of its errors larger than those of the best stock solver. nodes: the grid to start from.
    climbed: names out of `RUNGS`. done: results of an interrupted climb, which are not searched again.
    on_rung: told each result; on_stage: told what begins. Raises ValueError for unknown rungs.
    """
    for name in climbed:
        if name not in RUNGS:
            raise unknown("rung", name, list(RUNGS))
    say = on_stage or (lambda _: None)
    say("stock solvers")
    stock = stock_schedules(steps, nodes)
    told = {name: errors(held_out, schedule).told() for name, schedule in stock.items()}
    climb = Climb(stock[min(told, key=lambda name: told[name]["mean_loss"])], (), told)
    known = {result.name: result for result in done}
    for name in RUNGS:
        if name not in climbed:
            continue
        result = known.get(name)
        if result is None:
            say(name)
            result = _climb_one(name, train, held_out, climb, steps, nodes)
            if on_rung is not None:
                on_rung(result)
        schedule = result.schedule if result.accepted else climb.schedule
        climb = replace(climb, schedule=schedule, rungs=(*climb.rungs, result))
    return climb


def _climb_one(
    name: str, train: Problem, held_out: Problem, climb: Climb, steps: int, nodes: Nodes
) -> RungResult:
    began, before, leader = perf_counter(), _spent(train, held_out), _Leader(held_out)
    _RUNG[name](train, leader, climb, steps, nodes)
    schedule, reached = leader.schedule, leader.errors
    assert schedule is not None  # noqa: S101 - every rung shows at least one finite schedule or is refused
    best, stock = errors(held_out, climb.schedule), climb.stock[climb.baseline]
    better = reached.mean_loss < best.mean_loss
    accepted = better and reached.mean <= stock["mean"] and reached.p95 <= stock["p95"]
    return RungResult(
        name=name,
        schedule=schedule,
        train=errors(train, schedule).told(),
        held_out=reached.told(),
        evaluations=_spent(train, held_out) - before,
        seconds=round(perf_counter() - began, 1),
        accepted=accepted,
    )


def _spent(*problems: Problem) -> int:
    """Evaluations of all problems, those of a shared count once."""
    return sum(memo.evaluated for memo in {id(each.memo): each.memo for each in problems}.values())


def _ratios(train: Problem, leader: _Leader, climb: Climb, steps: int, nodes: Nodes) -> None:
    """DC-Solver on the best corrector policy, on the paper's, on DDIM and on the best stock solvers."""
    times = train.levels.time_of_sigma(nodes.sigmas(train.levels, steps)[:-1]).tolist()
    policies = rungs.corrector_policies(steps, nodes, times)
    stock = sorted(stock_schedules(steps, nodes).values(), key=lambda each: errors(train, each).mean_loss)
    starts = (rungs.best(train, policies), policies[1], ddim(steps, nodes), *stock[:2])
    for schedule in dict.fromkeys(starts):
        leader.watch(schedule)
        rungs.ratios(train, schedule, watch=leader.watch)


def _grid(train: Problem, leader: _Leader, climb: Climb, steps: int, nodes: Nodes) -> None:
    """Other nodes for the best multistep solver and for DDIM, from the better of all named grids each.

    With few evaluations, large guidance and sharp data, nodes in the right places are worth more than order.
    """
    grids = (nodes, *_elsewhere(nodes))
    families = (
        [each for at in grids for each in rungs.multistep(steps, at)],
        [ddim(steps, at) for at in grids],
    )
    for family in families:
        start = rungs.best(train, family)
        leader.watch(start)
        rungs.grid(train, start, watch=leader.watch)


def _coefficients(train: Problem, leader: _Leader, climb: Climb, steps: int, nodes: Nodes) -> None:
    """Weights of all outputs, on the grid of the rung below and on the given one."""
    starts = [result.schedule for result in climb.rungs if result.name == "grid"]
    starts.append(rungs.best(train, rungs.multistep(steps, nodes)))
    for schedule in starts:
        rungs.coefficients(train, schedule, watch=leader.watch)


def _full(train: Problem, leader: _Leader, climb: Climb, steps: int, nodes: Nodes) -> None:
    """Weights of all outputs and all states, and the timesteps that the network is told."""
    below = [result.schedule for result in climb.rungs if result.name == "coefficients"]
    start = below[0] if below else rungs.best(train, rungs.multistep(steps, nodes))
    leader.watch(start)
    rungs.coefficients(train, start, states=True, shifts=True, watch=leader.watch)


_RUNG = {"ratios": _ratios, "grid": _grid, "coefficients": _coefficients, "full": _full}
