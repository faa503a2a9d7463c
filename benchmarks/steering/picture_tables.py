"""What the cells of a picture run say: figures with standard errors, a table, and the bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering.pictures import FREE, Cell, Grid, kept

FIGURES = ("strict_best", "score_best", "strict_mean", "score_mean", "roots")
COSTS = ("evaluations", "seconds", "decode_seconds", "reward_seconds")
Results = dict[str, dict[str, dict[str, float]]]


def summary(grid: Grid, chunk: int, folder: Path) -> Results:
    """Per rule and budget: mean and standard error (over prompts) of each figure, costs, and how many
    pictures are behind it; from the cells that are there.

    Rules without selections have the first n of their draws, at that share of the costs; "plain" has one.
    """
    found: Results = {}
    held = [pair for cell in grid.cells(chunk) if (pair := kept(cell, folder)) is not None]
    for rule in grid.rules:
        of_rule = [(cell, made) for cell, made in held if cell.rule == rule]
        for budget in sorted(grid.budgets):
            made = [pair for pair in of_rule if rule in FREE or pair[0].budget == budget]
            if made:
                drawn = budget if rule in FREE else None
                found.setdefault(rule, {})[str(budget)] = _averaged(made, drawn)
        if rule == FREE[0] and of_rule:
            found["plain"] = {"1": _averaged(of_rule, 1)}
    return found


def figures(made: dict[str, Any], drawn: int | None) -> dict[str, list[float]]:
    """The figures of every prompt of a cell, from its first `drawn` pictures or all.

    best: by the score. mean: of a picture drawn by the final weights, which free draws share evenly.
    """
    score, strict = np.array(made["score"])[:, :drawn], np.array(made["strict"], dtype=float)[:, :drawn]
    best = np.arange(len(score)), score.argmax(1)
    weights = np.array(made["weights"])[:, :drawn]
    weights /= weights.sum(1, keepdims=True)
    return {
        "strict_best": strict[best].tolist(),
        "score_best": score[best].tolist(),
        "strict_mean": (weights * strict).sum(1).tolist(),
        "score_mean": (weights * score).sum(1).tolist(),
        "roots": made["roots"] if drawn is None else [float(drawn)] * len(score),
    }


def _averaged(held: Sequence[tuple[Cell, dict[str, Any]]], drawn: int | None) -> dict[str, float]:
    """Means over prompts, each the mean of its seeds."""
    share = [1.0 if drawn is None else drawn / cell.budget for cell, _ in held]
    sizes = [len(made["roots"]) for _, made in held]
    row = {}
    for name in COSTS:
        each = [s * made[name] for s, (_, made) in zip(share, held, strict=True)]
        row[name] = float(np.average(each, weights=sizes))
    by_cell = [(cell, figures(made, drawn)) for cell, made in held]
    for name in FIGURES:
        by_prompt: dict[tuple[int, int], list[float]] = {}
        for cell, found in by_cell:
            for i, value in enumerate(found[name]):
                by_prompt.setdefault((cell.chunk, i), []).append(value)
        means = np.array([np.mean(values) for values in by_prompt.values()])
        row[name] = float(means.mean())
        row[f"{name}_se"] = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    row["pictures"] = float(sum(sizes))
    return row


def table(results: Results) -> str:
    """The results as a markdown table."""
    heads = "rule | evaluations | strict, best | score, best | strict, mean | score, mean | roots | seconds"
    lines = [f"| {heads} |", f"|{'---|' * 8}"]
    for rule, budgets in results.items():
        for row in budgets.values():
            cells = [
                f"{row['evaluations']:.0f}",
                _percent(row, "strict_best"),
                f"{row['score_best']:.3f} ± {row['score_best_se']:.3f}",
                _percent(row, "strict_mean"),
                f"{row['score_mean']:.3f} ± {row['score_mean_se']:.3f}",
                f"{row['roots']:.1f}",
                f"{row['seconds']:.2f}",
            ]
            lines.append(f"| {' | '.join([rule, *cells])} |")
    return "\n".join(lines)


def _percent(row: dict[str, float], name: str) -> str:
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_se']:.1f} %"


def bars(results: Results) -> dict[str, dict[str, Any]]:
    """What steering must reach, with the figures: per budget, from the rules that were measured.

    Beside FK and SVDD stands the better one of the two ways of drawing freely, with noise and without.
    """
    found: dict[str, dict[str, Any]] = {}
    for budget in sorted({int(b) for rule in FREE for b in results.get(rule, {})}):
        at = {rule: rows[str(budget)] for rule, rows in results.items() if str(budget) in rows}
        free = [at[rule] for rule in FREE if rule in at]
        steered = {rule: at[rule] for rule in ("fk", "svdd") if rule in at}
        if "fk" in steered:
            gain = steered["fk"]["strict_mean"] - max(row["strict_mean"] for row in free)
            found[f"{budget}: FK's mean picture is 25 points above the mean of free ones"] = {
                "gain": gain,
                "met": gain >= 0.25,
            }
        if steered:
            name = f"{budget}: the better of FK and SVDD is not below best-of-n by a standard error"
            found[name] = _lead(steered, max(free, key=lambda row: row["strict_best"]), beats=budget == 16)
    return found


def _lead(steered: dict[str, dict[str, float]], best: dict[str, float], *, beats: bool) -> dict[str, Any]:
    """How far the better of some rules is ahead of best-of-n; beats: it must be ahead."""
    rule, top = max(steered.items(), key=lambda item: item[1]["strict_best"])
    lead = top["strict_best"] - best["strict_best"]
    error = math.hypot(top["strict_best_se"], best["strict_best_se"])
    return {"rule": rule, "lead": lead, "error": error, "met": lead >= -error and (not beats or lead > 0)}
