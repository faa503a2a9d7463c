"""The real numbers of a schedule as one list: weights of outputs and of states, time shifts, the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta
from diffplug.samplers.search.problem import Problem

__all__ = ["SHIFT_UNIT", "Numbers", "Times"]

Floats = npt.NDArray[np.float64]
LEAST_SHARE = 1e-4  # of the whole time, the shortest step of a learned grid
SHIFT_UNIT = 10.0  # timesteps that a number for a time shift stands for


@dataclass(frozen=True)
class Times:
    """A grid as the logarithms of its N steps in time over the last one's: any N - 1 numbers are a grid."""

    start: float
    flow_steps: int | None
    final: str

    @classmethod
    def of(cls, problem: Problem, schedule: SolverSchedule) -> tuple[Times, Floats]:
        sigmas = schedule.nodes.sigmas(problem.levels, len(schedule.steps))
        times = np.append(problem.levels.time_of_sigma(sigmas[:-1]), 0.0)
        flow = problem.levels.train_steps if problem.levels.flow else None
        final = "zero" if schedule.nodes.ends_clean else "sigma_min"
        shares = np.maximum(-np.diff(times) / times[0], LEAST_SHARE)
        return cls(float(times[0]), flow, final), np.log(shares[:-1] / shares[-1])

    def nodes(self, theta: Floats) -> Nodes:
        shares = np.exp(np.append(theta, 0.0) - max(0.0, theta.max(initial=0.0)))
        shares = np.maximum(shares / shares.sum(), LEAST_SHARE)
        left = 1.0 - np.cumsum(shares / shares.sum())[:-1]
        times = self.start * np.append(1.0, left)
        if self.flow_steps is not None:
            return Nodes(kind="sigmas", values=tuple((times / self.flow_steps).tolist()), final=self.final)
        return Nodes(kind="timesteps", values=tuple(times.tolist()), final=self.final)


@dataclass(frozen=True)
class Numbers:
    """The numbers of a schedule as one list: weights of outputs, weights of states, time shifts, the grid.

    states, shifts, nodes: whether the last three are in it.
    """

    schedule: SolverSchedule
    times: Times | None
    shares: Floats
    states: bool
    shifts: bool
    nodes: bool

    @classmethod
    def weights(cls, schedule: SolverSchedule) -> Numbers:
        """All numbers but the grid."""
        return cls(schedule, None, np.empty(0), states=True, shifts=True, nodes=False)

    @property
    def bare(self) -> SolverSchedule:
        """The schedule without what the numbers say."""
        return replace(self.schedule, deltas=None, time_shift=None)

    @property
    def counts(self) -> list[int]:
        """How many numbers of each kind there are."""
        steps = len(self.schedule.steps)
        weights = steps * (steps + 1) // 2
        return [weights, weights * self.states, steps * self.shifts, (steps - 1) * self.nodes]

    def read(self) -> Floats:
        steps = len(self.schedule.steps)
        deltas = [delta or Delta() for delta in self.schedule.deltas or (Delta(),) * steps]
        data = [_entry(delta.data, k) for i, delta in enumerate(deltas) for k in range(i + 1)]
        olds = [_entry(delta.states, k) for i, delta in enumerate(deltas) for k in range(i + 1)]
        shifts = np.array(self.schedule.time_shift or (0.0,) * steps) / SHIFT_UNIT
        parts = zip((data, olds, shifts, self.shares), self.counts, strict=True)
        return np.concatenate([part for part, count in parts if count])

    def write(self, values: Floats) -> SolverSchedule:
        data, olds, shifts, shares = np.split(values, np.cumsum(self.counts)[:-1])
        ends = np.cumsum(range(len(self.schedule.steps)))
        rows = (_rows(part, ends) if len(part) else [()] * len(ends) for part in (data, olds))
        return replace(
            self.schedule,
            deltas=tuple(Delta(*row) for row in zip(*rows, strict=True)),
            time_shift=tuple((SHIFT_UNIT * shifts).tolist()) if self.shifts else self.schedule.time_shift,
            nodes=self.times.nodes(shares) if self.times and self.nodes else self.schedule.nodes,
        )


def _rows(values: Floats, begins: npt.NDArray[np.int_]) -> list[tuple[float, ...]]:
    """A triangle of numbers, row by row: one number, then two, and so on."""
    return [tuple(row.tolist()) for row in np.split(values, begins[1:])]


def _entry(values: Sequence[float], k: int) -> float:
    return values[k] if k < len(values) else 0.0
