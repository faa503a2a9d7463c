"""Students on the toy: segmented consistency in its modes, and the one-step finish, against their bars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.distill import ring
from diffplug.training.objectives.one_step import OneStep, OneStepSettings
from diffplug.training.objectives.segmented_consistency import ConsistencySettings, SegmentedConsistency
from diffplug.training.trajectories import Trajectories

STAGES = (8, 4, 2, 1)
MODES: dict[str, tuple[ConsistencySettings, str]] = {
    "faithful TSCD": (ConsistencySettings(segments=STAGES, p_edge=0.0, guidance=(1, 1)), "previous"),
    "edge targets .5": (ConsistencySettings(segments=STAGES, p_edge=0.5, guidance=(1, 1)), "previous"),
    "PCM": (ConsistencySettings(segments=STAGES, p_edge=1.0, guidance=(1, 1), teacher="base"), "base"),
}
BARS = {  # (RMSE, SWD) at 1, 2, 4, 8 evaluations
    "faithful TSCD": {1: (0.32, 0.30), 2: (0.18, 0.16), 4: (0.12, 0.10), 8: (0.08, 0.07)},
    "faithful TSCD, k = 1": {1: (0.32, 0.30), 2: (0.10, 0.08), 4: (0.10, 0.09), 8: (0.12, 0.11)},
    "edge targets .5": {1: (0.21, 0.12), 2: (0.11, 0.07), 4: (0.09, 0.065), 8: (0.07, 0.06)},
    "PCM": {1: (0.21, 0.12), 2: (0.11, 0.07), 4: (0.09, 0.065), 8: (0.07, 0.06)},
}
Found = dict[int, tuple[float, float]]


def student(
    mode: str, base: dict[str, Tensor], seed: int, folder: Path, updates: int = 1000
) -> dict[int, dict[str, Tensor]]:
    """Return the students of the four stages, by their number of segments."""
    told, teacher = MODES[mode]
    net, previous, found = ring.network(base), None, {}
    for stage, k in enumerate(STAGES):
        points = told.points if stage == 0 or teacher == "base" else 4 * k
        objective = SegmentedConsistency(
            net, ring.FreshRing(), told, segments=k, points=points, teacher=previous
        )
        place = folder / f"{mode.replace(' ', '-')}-{seed}-{k}"
        weights = ring.fitted(objective, place, updates=updates, lr=1e-3, ema=0.95, seed=10 * seed + stage)
        net.put(weights)
        found[k] = weights
        previous = weights if teacher == "previous" else None
    return found


def measured(net: ring.Network, weights: dict[str, Tensor], n: int, end: Tensor) -> tuple[float, float]:
    """Return (RMSE to the teacher's end points, sliced distance to the data) of n evaluations."""
    with net.holding(weights):
        x = ring.ddim(net, n)
    return ring.rmse(x, end), ring.sliced(x, ring.data())


def undistilled(net: ring.Network, end: Tensor) -> dict[str, Found]:
    """Return the stock solvers' distances with the teacher."""
    runs = {"DDIM": lambda n: ring.ddim(net, n)}
    runs |= {name: (lambda n, name=name: ring.solver(net, name, n)) for name in ("DPM++2M", "UniPC")}
    return {
        name: {n: (ring.rmse(x, end), ring.sliced(x, ring.data())) for n in (1, 2, 4, 8) for x in [run(n)]}
        for name, run in runs.items()
    }


def consistency(folder: Path, seeds: int = 3, modes: tuple[str, ...] = tuple(MODES)) -> dict[str, Any]:
    """Return every table: stock solvers, each mode at n = k, and its last student at every n."""
    base = ring.teacher(folder / "teacher")
    net = ring.network(base)
    end = ring.ddim(net, 1000)
    stock = undistilled(net, end)
    best = {n: min(found[n][0] for found in stock.values()) for n in (1, 2, 4, 8)}
    out: dict[str, Any] = {"stock": stock, "floor": ring.sliced(end, ring.data())}
    for mode in modes:
        runs = [student(mode, base, seed, folder) for seed in range(seeds)]
        own = [{k: measured(net, run[k], k, end) for k in STAGES} for run in runs]
        one = [{n: measured(net, run[1], n, end) for n in STAGES} for run in runs]
        out[mode] = {n: _means(run[n] for run in own) for n in (1, 2, 4, 8)}
        out[f"{mode}, k = 1"] = {n: _means(run[n] for run in one) for n in (1, 2, 4, 8)}
        out[f"{mode}: times better than the best solver"] = {
            n: best[n] / out[mode][n][0] for n in (1, 2, 4, 8)
        }
    return out


def _means(pairs: Any) -> tuple[float, float]:
    listed = list(pairs)
    return fmean(a for a, _ in listed), fmean(b for _, b in listed)


def met(tables: dict[str, Any]) -> dict[str, bool]:
    """Return which bars are met."""
    return {
        f"{name} at {n}": tables[name][n][0] <= r and tables[name][n][1] <= s
        for name, bar in BARS.items()
        if name in tables
        for n, (r, s) in bar.items()
    }


def one_step(folder: Path, updates: int = 1500) -> dict[str, Any]:
    """Return what score distillation with and without its regression makes of a one-segment student.

    The student is that of one-stage trajectory consistency with the teacher's own steps (k = 1).
    """
    base = ring.teacher(folder / "teacher")
    net = ring.network(base)
    end = ring.ddim(net, 1000)
    told = ConsistencySettings(segments=(1,), p_edge=0.0, guidance=(1, 1), teacher="base")
    objective = SegmentedConsistency(net, ring.FreshRing(), told, segments=1, points=40)
    before = ring.fitted(objective, folder / "one-segment", updates=4000, lr=1e-3, ema=0.95)
    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(77))
    net.put(base)
    goal = ring.ddim(net, 8, z)
    stored = Trajectories(torch.stack([z, goal], dim=1), torch.tensor([1000.0, 0.0]), ring.NONE, [])
    out: dict[str, Any] = {"before": _one_step_row(net, before, end)}
    settings = OneStepSettings(guidance=1.0, anchor=0.25, anchor_share=1.0, fake_lr=10 / 3, warmup=100)
    for name, anchor in (("DMD alone", 0.0), ("DMD + .25 MSE", 0.25)):
        other = ring.network(base)
        other.put(before)
        finish = ToyOneStep(other, stored, replace(settings, anchor=anchor))
        place = folder / name.replace(" ", "-")
        weights = ring.fitted(finish, place, updates=updates, lr=3e-4, ema=0.98)
        out[name] = _one_step_row(other, weights, end)
    return out


class ToyOneStep(OneStep):
    """The one-step finish without prompts: there are stored noises, and no conditions to draw."""

    def __init__(self, network: ring.Network, stored: Trajectories, settings: OneStepSettings) -> None:
        super().__init__(network, ring.NONE, settings, segments=1, data=stored)
        assert self.data is not None  # noqa: S101

    def _state(self, rows: Any, j: int) -> Any:
        assert self.data is not None  # noqa: S101
        states = self.data.states[rows.items(len(self.data))]
        return states[:, 0], ring.NONE, (states[:, 1], torch.ones(len(states)))


def _one_step_row(net: ring.Network, weights: dict[str, Tensor], end: Tensor) -> dict[str, float]:
    with net.holding(weights):
        x, four, noisy = ring.ddim(net, 1), ring.ddim(net, 4), ring.ddim(net, 4, eta=1.0)
    off, least = ring.modes(x)
    return {
        "rmse": ring.rmse(x, end),
        "swd": ring.sliced(x, ring.data()),
        "off": off,
        "least": least,
        "four_rmse": ring.rmse(four, end),
        "four_swd": ring.sliced(four, ring.data()),
        "four_noisy_swd": ring.sliced(noisy, ring.data()),
    }
