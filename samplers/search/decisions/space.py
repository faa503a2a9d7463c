"""The space of solver schedules as a fixed number of named numbers, every setting of which is a valid solver.

Decisions of arXiv 2312.07243 (S3 / USF), one slot a step. What a slot says beyond what its step can have (an
order above the evaluations so far, a corrector at the last step) is cut when a schedule is made of it, so
that samplers of numbers need no conditions. A grid is a number of steps in lambda, each the logarithm of its
length over the base grid's: any numbers are a grid, and no sorting moves decisions to another step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Derivative, Linear, Scale, SolverStep, Update

__all__ = ["Dimension", "ScheduleSpace", "Values"]

Floats = npt.NDArray[np.float64]
Values = dict[str, Any]

HIGHEST_ORDER = 4
PARAMS = ("data", "noise", "mixed")
FIRST = ("model", "zero_x0", "mean")
NO_SIGNAL = -8.0  # the lambda below which noise predictions say nothing: a flow model starts there
GAP, SCALE = 2.0, 0.5  # the largest log ratio of a step to the base grid's, the largest relaxation


@dataclass(frozen=True)
class Dimension:
    """One number of the space: a real one in [low, high], or one of `choices`."""

    name: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    @property
    def real(self) -> bool:
        return not self.choices


@dataclass(frozen=True)
class ScheduleSpace:
    """All schedules of `evaluations` network evaluations for a model with these noise levels.

    nodes: the ends of the grid, and what a gap of 0 means. analytic: whether the first step may do without
    the network (then there is one step more); flow models and guided latent models should not. mean: of the
    data, one number or one for each channel: then such a first step may take it for the prediction.
    starts: from how many nodes back a step may start, as singlestep solvers do; rarely of use.
    statistics: path of the model's statistics: then a step may stand on them ("ems", DPM-Solver-v3).
    """

    evaluations: int
    levels: NoiseLevels
    nodes: Nodes
    analytic: bool = False
    mean: tuple[float, ...] | None = None
    starts: int = 0
    statistics: str | None = None

    def __post_init__(self) -> None:
        if self.mean is not None and not self.analytic:
            raise ValueError("mean is for analytic first steps: set analytic=True, or leave it out")

    @property
    def firsts(self) -> tuple[str, ...]:
        """What may stand for the first evaluation."""
        return FIRST[: 1 + self.analytic + (self.mean is not None)]

    @property
    def params(self) -> tuple[str, ...]:
        """What a step may predict."""
        return PARAMS if self.statistics is None else (*PARAMS, "ems")

    @property
    def slots(self) -> int:
        """How many steps a schedule can have."""
        return self.evaluations + self.analytic

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Every number, always all of them: name, range or choices."""
        found = [Dimension("first", choices=self.firsts)] if self.analytic else []
        for i in range(self.slots):
            found += [
                Dimension(f"gap_{i}", -GAP, GAP),
                Dimension(f"param_{i}", choices=self.params),
                Dimension(f"mix_{i}", 0.0, 1.0),
                Dimension(f"order_{i}", choices=tuple(range(1, HIGHEST_ORDER + 1))),
                Dimension(f"near_{i}", choices=(False, True)),
                Dimension(f"scale_{i}", -SCALE, SCALE),
                Dimension(f"correct_{i}", choices=(False, True)),
            ]
            if self.starts:
                found.append(Dimension(f"back_{i}", choices=tuple(range(self.starts + 1))))
        return tuple(found)

    def steps(self, values: Mapping[str, Any]) -> int:
        """How many steps these values have."""
        return self.evaluations + (self.analytic and values["first"] != "model")

    def base_gaps(self, steps: int) -> tuple[float, Floats, bool]:
        """(first lambda, lengths of the steps in lambda [steps], whether sigma 0 follows) of the base grid.

        A last step to sigma 0 has no length: the lambda before it is where the steps end.
        """
        sigmas = self.nodes.sigmas(self.levels, steps)
        clean = bool(sigmas[-1] == 0)
        lams = np.array([self.levels.level(float(s)).lam for s in (sigmas[:-1] if clean else sigmas)])
        return float(lams[0]), np.diff(lams), clean

    def schedule(self, values: Mapping[str, Any]) -> SolverSchedule:
        """The schedule that these values mean; ValueError for a missing number."""
        missing = [d.name for d in self.dimensions if d.name not in values]
        if missing:
            raise ValueError(f"the values lack {', '.join(missing[:3])}: give all {len(self.dimensions)}")
        count = self.steps(values)
        nodes = self._grid(count, values)
        steps = tuple(self._step(i, count, values, nodes.values[i]) for i in range(count))
        first = str(values["first"]) if self.analytic else "model"
        mean = self.mean if first == "mean" else None
        needed = self.statistics if any(step.param == "ems" for step in steps) else None
        return SolverSchedule(nodes=nodes, steps=steps, first=first, mean=mean, statistics=needed)

    def _grid(self, count: int, values: Mapping[str, Any]) -> Nodes:
        start, base, clean = self.base_gaps(count)
        shares = base * np.exp([float(values[f"gap_{i}"]) for i in range(len(base))])
        lams = start + np.append(0.0, np.cumsum(shares / shares.sum()) * base.sum())
        nodes = [*lams.tolist(), *[math.inf] * clean]
        return Nodes(kind="lambda", values=tuple(nodes))

    def _step(self, i: int, count: int, values: Mapping[str, Any], lam: float) -> SolverStep:
        last = i == count - 1
        clean = last and self.nodes.ends_clean
        order = 1 if clean else min(int(values[f"order_{i}"]), i + 1)
        param = "data" if lam < NO_SIGNAL else self._param(i, clean, values)
        scale = Scale("linear", float(values[f"scale_{i}"])) if values[f"scale_{i}"] else Scale()
        near = bool(values[f"near_{i}"])
        back = min(int(values[f"back_{i}"]), i) if self.starts else 0
        predict = _update(order, _newest(back, order - 1), near, scale, -back)
        correct = None
        if values[f"correct_{i}"] and not last:
            correct = _update(order + 1, (1, *range(-1, -order, -1)), False, Scale())
        return SolverStep(param=param, predict=predict, correct=correct)

    def _param(self, i: int, clean: bool, values: Mapping[str, Any]) -> str | Linear:
        kind = str(values[f"param_{i}"])
        if kind in ("data", "noise"):
            return kind
        mix = float(values[f"mix_{i}"])
        return "data" if clean else kind if kind == "ems" else Linear(mix, mix - 1.0)

    def values(self, schedule: SolverSchedule) -> Values:
        """The values nearest to a schedule: presets and schedules found elsewhere, as places to begin.

        What it does not have (named relaxations, start points, statistics, ratios, deltas) is left out.
        Raises ValueError for a schedule with another number of evaluations.
        """
        if schedule.nfe != self.evaluations or len(schedule.steps) > self.slots:
            raise ValueError(f"the schedule has {schedule.nfe} evaluations, the space {self.evaluations}")
        count = len(schedule.steps)
        sigmas = schedule.nodes.sigmas(self.levels, count)
        _, base, _ = self.base_gaps(count)
        kept = sigmas[: len(base) + 1]
        lams = np.array([self.levels.level(max(float(s), 1e-8)).lam for s in kept])
        gaps = np.log(np.maximum(np.diff(lams), 1e-6) / base) if len(base) else np.zeros(0)
        gaps = np.clip(gaps - np.median(gaps), -GAP, GAP) if len(base) else gaps
        found: Values = (
            {"first": schedule.first if schedule.first in self.firsts else "model"} if self.analytic else {}
        )
        for i in range(self.slots):
            step = schedule.steps[min(i, count - 1)]
            mix = step.param.l if isinstance(step.param, Linear) else float(step.param == "data")
            kind = "mixed" if isinstance(step.param, Linear) else step.param
            derivatives = step.predict.derivatives
            found |= {
                f"gap_{i}": float(gaps[i]) if i < len(gaps) else 0.0,
                f"param_{i}": kind if kind in self.params else "data",
                f"mix_{i}": float(np.clip(mix, 0.0, 1.0)),
                f"order_{i}": min(step.predict.order, HIGHEST_ORDER),
                f"near_{i}": bool(derivatives) and len(derivatives[0].points) < step.predict.order - 1,
                f"scale_{i}": _relaxation(derivatives[0].scale, step.param) if derivatives else 0.0,
                f"correct_{i}": step.correct is not None,
            }
            if self.starts:
                found[f"back_{i}"] = min(-step.predict.start, self.starts)
        return found


_LINEAR = {"bh1": -1 / 3, "bh2": 1 / 6, "exp": 0.5}  # first-order coefficients of the named relaxations


def _relaxation(scale: Scale, param: Any) -> float:
    """The coefficient of the linear relaxation that agrees with a named one to first order in h."""
    if scale.kind == "linear":
        return float(np.clip(scale.c, -SCALE, SCALE))
    sign = -1.0 if param == "data" else 1.0
    return sign * _LINEAR.get(scale.kind, 0.0) * (scale.c if scale.kind == "exp" else 1.0)


def _newest(back: int, count: int) -> tuple[int, ...]:
    """The newest evaluations but the start's own, counted from a start so many nodes back."""
    newer = tuple(range(back, 0, -1))[:count]
    return (*newer, *range(-1, len(newer) - count - 1, -1))


def _update(order: int, points: tuple[int, ...], near: bool, scale: Scale, start: int = 0) -> Update:
    """An update with all points for every derivative; `near`: the newest alone for the first."""
    derivatives = []
    for k in range(1, order):
        own = points[:1] if k == 1 and near else points
        derivatives.append(Derivative(own, scale if k == 1 else Scale()))
    return Update(order=order, derivatives=tuple(derivatives), start=start)
