"""Pictures of a search and of a schedule: score against cost, and the grid with orders and correctors."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from diffplug.files import atomic_path
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Linear, SolverStep
from diffplug.samplers.search.fits import explicit
from diffplug.samplers.search.metric import WORST
from diffplug.samplers.search.result import SearchResult

__all__ = ["plot_history", "plot_schedule"]

COLOURS = {"data": "#2b6cb0", "noise": "#c05621", "mixed": "#6b46c1", "ems": "#2f855a"}
OPEN_END = 1.0  # how far beyond the last finite lambda a node without noise is drawn


def plot_history(search: SearchResult, path: str | os.PathLike[str]) -> None:
    """Write a PNG: the best value so far against schedules run, beside the best preset and the winner."""
    figure, axes = _figure(7, 4)
    known = [(spent, best) for spent, best in search.history if best < WORST]
    spent, best = (np.array(each) for each in zip(*known, strict=True))
    axes.step(spent, best, where="post", color=COLOURS["data"], label="best so far, searched pairs")
    axes.axhline(search.presets[search.baseline]["value"], color="grey", linestyle=":", label=search.baseline)
    axes.axhline(
        search.validation["value"], color=COLOURS["noise"], linestyle="--", label="given, validation"
    )
    if (best > 0).all():
        axes.set_yscale("log")
    axes.set_xlabel("schedules run on all pairs")
    axes.set_ylabel(search.metric)
    axes.legend()
    _save(figure, path)


def plot_schedule(schedule: SolverSchedule, levels: NoiseLevels, path: str | os.PathLike[str]) -> None:
    """Write a PNG of a schedule: a bar from node to node in lambda, as high as the order.

    The colour is the prediction type, a ring stands where a corrector follows, a cross where the first step
    does without the network.
    """
    figure, axes = _figure(8, 3)
    lams = list(explicit(schedule, levels).nodes.values)
    if not np.isfinite(lams[-1]):
        lams[-1] = lams[-2] + OPEN_END
    drawn: set[str] = set()
    for i, step in enumerate(schedule.steps):
        kind = _kind(step)
        label = None if kind in drawn else kind
        drawn.add(kind)
        axes.bar(
            lams[i], step.predict.order, lams[i + 1] - lams[i], align="edge", color=COLOURS[kind],
            edgecolor="white", alpha=0.8, label=label,
        )  # fmt: skip
        if step.correct is not None:
            axes.plot(lams[i + 1], step.correct.order, "o", color="black", fillstyle="none", markersize=9)
    if schedule.first != "model":
        axes.plot(lams[0], 0.2, "x", color="black", markersize=9)
    axes.plot(lams, np.zeros(len(lams)), "|", color="black", markersize=14, clip_on=False)
    axes.set_xlabel("lambda = log(alpha / sigma); o: corrector, x: analytic start")
    axes.set_ylabel("order")
    axes.set_yticks(range(1, 1 + max(s.predict.order for s in schedule.steps) + 1))
    axes.legend(loc="upper right")
    axes.set_title(f"{schedule.nfe} evaluations")
    _save(figure, path)


def _kind(step: SolverStep) -> str:
    return "mixed" if isinstance(step.param, Linear) else step.param


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: plots need matplotlib, pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
