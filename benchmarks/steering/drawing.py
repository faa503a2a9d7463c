"""Reward against network evaluations, one line a rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffplug.files import atomic_path

_PANELS = (("score_best", "the picture handed back"), ("score_mean", "a picture drawn by its weight"))


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Write a PNG or SVG with two panels: the best picture and the mean one, with their standard errors."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, _PANELS, strict=True):
        for rule, budgets in results.items():
            _line(axes, rule, budgets, name)
        axes.set_xscale("log", base=2)
        spent = sorted(
            {round(row["evaluations"]) for budgets in results.values() for row in budgets.values()}
        )
        axes.set_xticks(spent, [str(n) for n in spent])
        axes.set_xlabel("network evaluations a picture")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("score: share of the prompt's facts that hold")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=120)


def _line(axes: Any, rule: str, budgets: dict[str, dict[str, float]], name: str) -> None:
    rows = sorted(budgets.values(), key=lambda row: row["evaluations"])
    axes.errorbar(
        [row["evaluations"] for row in rows],
        [row[name] for row in rows],
        [row[f"{name}_se"] for row in rows],
        marker="o",
        markersize=4,
        capsize=2,
        label=rule,
    )
