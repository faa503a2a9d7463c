"""The real numbers of a schedule as one vector: blocks of them, read, written and moved by every fit.

A grid is the logarithms of its steps over the last one's, so that any numbers are a grid: steps in time where
the nodes are timesteps or sigmas, in lambda where they are lambdas (`explicit` makes either of a named grid).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta, Derivative, Linear, Scale, SolverStep

__all__ = ["BLOCKS", "NO_SIGNAL", "SHIFT_UNIT", "Block", "Parameters", "explicit", "with_ratios"]

Floats = npt.NDArray[np.float64]
NO_SIGNAL = -8.0  # the lambda below which noise predictions say nothing
LEAST_SHARE = 1e-4  # of the whole time, the shortest step of a learned grid
SHIFT_UNIT = 10.0  # timesteps that a number for a time shift stands for


@dataclass(frozen=True)
class Block:
    """A block of continuous parameters.

    read: to a vector. write: from one. step: of finite differences. ridge: the weight that holds them near
    where they began.
    """

    read: Callable[[SolverSchedule], Floats]
    write: Callable[[SolverSchedule, Floats], SolverSchedule]
    step: float = 1e-2
    ridge: float = 1e-4


@dataclass(frozen=True)
class Parameters:
    """Some blocks of a schedule's numbers as one vector; names: out of `BLOCKS`, in their order."""

    schedule: SolverSchedule
    names: Sequence[str]

    @property
    def blocks(self) -> list[Block]:
        return [BLOCKS[name] for name in self.names]

    @property
    def counts(self) -> list[int]:
        """How many numbers each block has."""
        return [len(block.read(self.schedule)) for block in self.blocks]

    @property
    def steps(self) -> Floats:
        """The step of finite differences of each number."""
        return np.repeat([block.step for block in self.blocks], self.counts)

    @property
    def ridge(self) -> Floats:
        """The ridge's weight of each number."""
        return np.repeat([block.ridge for block in self.blocks], self.counts)

    def read(self) -> Floats:
        """Return the vector of the schedule as it is."""
        return np.concatenate([block.read(self.schedule) for block in self.blocks])

    def write(self, values: Floats) -> SolverSchedule:
        """Return the schedule with these numbers."""
        found = self.schedule
        for block, part in zip(self.blocks, np.split(values, np.cumsum(self.counts)[:-1]), strict=True):
            found = block.write(found, part)
        return found


def explicit(schedule: SolverSchedule, levels: NoiseLevels, clock: str = "lambda") -> SolverSchedule:
    """Return the schedule with its nodes as lambdas, or as what Diffusers takes for them (`clock="time"`)."""
    sigmas = schedule.nodes.sigmas(levels, len(schedule.steps))
    if clock == "lambda":
        lams = [np.inf if sigma == 0 else levels.level(float(sigma)).lam for sigma in sigmas]
        return replace(schedule, nodes=Nodes(kind="lambda", values=tuple(lams)))
    times, final = levels.time_of_sigma(sigmas[:-1]), "zero" if schedule.nodes.ends_clean else "sigma_min"
    kind, values = ("sigmas", times / levels.train_steps) if levels.flow else ("timesteps", times)
    return replace(schedule, nodes=Nodes(kind=kind, values=tuple(values.tolist()), final=final))


def with_ratios(schedule: SolverSchedule, given: dict[int, float]) -> SolverSchedule:
    """Return the schedule with other compensation ratios at some steps."""
    return _changed(schedule, given.items(), lambda step, ratio: replace(step, ratio=ratio))


def _read_grid(schedule: SolverSchedule) -> Floats:
    """Return N - 1 logarithms of steps over the last one's; before a clean end, of steps in lambda alone."""
    if schedule.nodes.kind != "lambda":
        times = np.append(schedule.nodes.values, 0.0)
        shares = np.maximum(-np.diff(times) / times[0], LEAST_SHARE)
        return np.log(shares[:-1] / shares[-1])
    lams = np.array([lam for lam in schedule.nodes.values if np.isfinite(lam)])
    logs = np.log(np.diff(lams))
    return logs if schedule.nodes.ends_clean else logs[:-1] - logs[-1]


def _write_grid(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    old = schedule.nodes.values
    shares = np.exp(np.append(theta, 0.0) - max(0.0, theta.max(initial=0.0)))
    if schedule.nodes.kind != "lambda":
        shares = np.maximum(shares / shares.sum(), LEAST_SHARE)
        times = old[0] * np.append(1.0, 1.0 - np.cumsum(shares / shares.sum())[:-1])
        return replace(schedule, nodes=replace(schedule.nodes, values=tuple(times.tolist())))
    if schedule.nodes.ends_clean:
        new = [old[0], *(old[0] + np.cumsum(np.exp(theta))).tolist(), np.inf]
    else:
        inner = old[0] + np.cumsum(shares / shares.sum())[:-1] * (old[-1] - old[0])
        new = [old[0], *inner.tolist(), old[-1]]
    return replace(schedule, nodes=Nodes(kind="lambda", values=tuple(new)))


def _relaxed(schedule: SolverSchedule) -> list[int]:
    """Return the steps whose first derivative has a linear relaxation or none."""
    updates = [step.predict for step in schedule.steps]
    kinds = ("none", "linear")
    return [i for i, u in enumerate(updates) if u.order > 1 and u.derivatives[0].scale.kind in kinds]


def _read_relaxations(schedule: SolverSchedule) -> Floats:
    return np.array([schedule.steps[i].predict.derivatives[0].scale.c for i in _relaxed(schedule)])


def _write_relaxations(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    def changed(step: SolverStep, c: float) -> SolverStep:
        first, *rest = step.predict.derivatives
        scaled = Derivative(first.points, Scale("linear", c) if c else Scale())
        return replace(step, predict=replace(step.predict, derivatives=(scaled, *rest)))

    return _changed(schedule, zip(_relaxed(schedule), theta.tolist(), strict=True), changed)


def _mixed(schedule: SolverSchedule) -> list[int]:
    """Return the steps that may mix noise and data predictions: signal at the start, noise at the end."""
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

    return _changed(schedule, zip(_mixed(schedule), theta.tolist(), strict=True), changed)


def _read_ratios(schedule: SolverSchedule) -> Floats:
    return np.array(schedule.ratios[schedule.compensation[0] :])


def _write_ratios(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    return with_ratios(schedule, dict(enumerate(theta.tolist(), schedule.compensation[0])))


def _changed(
    schedule: SolverSchedule,
    given: Iterable[tuple[int, float]],
    change: Callable[[SolverStep, float], SolverStep],
) -> SolverSchedule:
    steps = list(schedule.steps)
    for i, value in given:
        steps[i] = change(steps[i], value)
    return replace(schedule, steps=tuple(steps))


def _additions(which: str) -> Block:
    """Return the block of what is added to the weights of all data predictions, or states, so far."""

    def read(schedule: SolverSchedule) -> Floats:
        rows = [getattr(delta, which) for delta in _deltas(schedule)]
        return np.array([row[k] if k < len(row) else 0.0 for i, row in enumerate(rows) for k in range(i + 1)])

    def write(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
        rows = np.split(theta, np.cumsum(range(1, len(schedule.steps))))
        deltas = zip(_deltas(schedule), rows, strict=True)
        return replace(
            schedule, deltas=tuple(replace(old, **{which: tuple(row.tolist())}) for old, row in deltas)
        )

    return Block(read, write)


def _deltas(schedule: SolverSchedule) -> list[Delta]:
    return [delta or Delta() for delta in schedule.deltas or (None,) * len(schedule.steps)]


def _read_shifts(schedule: SolverSchedule) -> Floats:
    return np.array(schedule.time_shift or (0.0,) * len(schedule.steps)) / SHIFT_UNIT


def _write_shifts(schedule: SolverSchedule, theta: Floats) -> SolverSchedule:
    return replace(schedule, time_shift=tuple((SHIFT_UNIT * theta).tolist()))


BLOCKS = {
    "grid": Block(_read_grid, _write_grid, step=2e-2, ridge=1e-5),
    "relaxations": Block(_read_relaxations, _write_relaxations),
    "mixtures": Block(_read_mixtures, _write_mixtures),
    "ratios": Block(_read_ratios, _write_ratios),
    "weights": _additions("data"),
    "states": _additions("states"),
    "shifts": Block(_read_shifts, _write_shifts),
}
