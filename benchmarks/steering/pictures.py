"""Rules of steering on hard prompts of the Shapes world, at equal numbers of network evaluations.

A cell is one rule, one budget, one seed and a few prompts. Cells are kept as they come, each in its own file,
so that a run may stop at any time and go on later, or on another day with more prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering.published import PublishedFeynmanKac
from diffplug.files import output_folder, read_json, write_json
from diffplug.recipe import Pictures, Recipe
from diffplug.registry import STEERERS
from diffplug.shapes import grade, sample_prompts

PUBLISHED = "published-fk"
RULES = ("plain", "best-of-n", "fk", "svdd", "code", "two-level", "noise-search", PUBLISHED)
FIGURES = ("strict_best", "score_best", "strict_mean", "score_mean", "roots")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a folder have in common."""

    kind: str = "relation"
    steps: int = 20
    guidance: float = 5.0
    sampler: str = "ddim"
    reward: str = "shapes"
    strength: float = 10.0
    chunk: int = 10
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rule with a budget of n times the steps, for one chunk of prompts in one seed."""

    rule: str
    budget: int
    seed: int
    chunk: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.rule}-{self.budget}-{self.seed}-{self.chunk:03d}.json"


def recipe(setting: Setting, rule: str, n: int) -> Recipe:
    """How a rule spends n * steps evaluations on a picture; steerers hand back all that they made."""
    common: dict[str, Any] = {"sampler": setting.sampler, "guidance": setting.guidance, "eta": 1.0}
    if rule == "plain":
        return Recipe(label=rule, steps=min(1000, setting.steps * n), **common)
    options: dict[str, Any] = {"returns": "all"}
    particles, strength = n, None if rule in ("best-of-n", "noise-search") else setting.strength
    if rule == "noise-search":  # several rounds of fewer, with a solver that follows its start noise
        rounds = 2 if n < 8 else 4
        options["rounds"], particles, common["eta"] = rounds, max(n // rounds, 1), 0.0
    if rule == "two-level":
        options["duplicates"] = 2
    return Recipe(
        label=rule,
        steps=setting.steps,
        steer=rule,
        particles=particles,
        reward=setting.reward,
        strength=strength,
        options=options,
        **common,
    )


def measure(pipe: Any, setting: Setting, cell: Cell, prompts: Sequence[str], max_rows: int) -> dict[str, Any]:
    """Figures of each prompt of a cell, and what the cell cost."""
    first = cell.seed * 10**6 + cell.chunk * setting.chunk
    made = recipe(setting, cell.rule, cell.budget).run(
        pipe, prompts, [first + i for i in range(len(prompts))], max_rows=max_rows
    )
    copies = len(made.images) // len(prompts)
    grades = grade(made.images, [prompt for prompt in prompts for _ in range(copies)])
    score = np.asarray(grades.score, dtype=np.float64).reshape(len(prompts), copies)
    strict = np.asarray(grades.strict, dtype=np.float64).reshape(len(prompts), copies)
    best = np.arange(len(prompts)), score.argmax(1)
    return {
        "strict_best": strict[best].tolist(),
        "score_best": score[best].tolist(),
        "strict_mean": strict.mean(1).tolist(),
        "score_mean": score.mean(1).tolist(),
        "roots": _roots(made, len(prompts), copies),
        "evaluations": made.evaluations / len(prompts),
        "seconds": made.seconds / len(prompts),
        "decode_seconds": sum(report.decode_seconds for report in made.reports) / len(prompts),
        "reward_seconds": sum(report.reward_seconds for report in made.reports) / len(prompts),
    }


def _roots(made: Pictures, prompts: int, copies: int) -> list[int]:
    """How many start noises the pictures of each prompt go back to."""
    found = [int(n) for report in made.reports if report.calls for n in report.distinct_roots[-1]]
    return found if len(found) == prompts else [copies] * prompts


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of a run: rules, budgets, seeds and the number of prompts."""

    rules: tuple[str, ...] = RULES
    budgets: tuple[int, ...] = (4, 8, 16, 32)
    seeds: int = 3
    prompts: int = 200

    def cells(self, chunk: int) -> Iterator[Cell]:
        """All cells, cheap budgets first, every rule before the next chunk: an early stop compares all."""
        for budget in sorted(self.budgets):
            for seed in range(self.seeds):
                for part in range(math.ceil(self.prompts / chunk)):
                    for rule in self.rules:
                        yield Cell(rule=rule, budget=budget, seed=seed, chunk=part)


def run(pipe: Any, setting: Setting, grid: Grid, folder: Path, *, max_rows: int, track: Any) -> None:
    """Measure every cell that the folder does not hold yet; ValueError for a folder of another setting."""
    if PUBLISHED not in STEERERS:
        STEERERS.register(PUBLISHED, PublishedFeynmanKac)
    open_folder(setting, folder)
    prompts = sample_prompts(grid.prompts, seed=0, kind=setting.kind, split="test")
    for cell in track(list(grid.cells(setting.chunk))):
        part = prompts[cell.chunk * setting.chunk : (cell.chunk + 1) * setting.chunk]
        held = read_json(folder / cell.file) if (folder / cell.file).exists() else None
        if held is None or len(held["roots"]) < len(part):
            write_json(folder / cell.file, measure(pipe, setting, cell, part, max_rows))


def open_folder(setting: Setting, folder: Path) -> None:
    """Make the folder of a setting, or check that it is the one it was made for."""
    output_folder(folder)
    path = folder / "setting.json"
    if path.exists() and read_json(path) != asdict(setting):
        held = read_json(path)
        other = [name for name, value in asdict(setting).items() if held.get(name) != value]
        raise ValueError(
            f"{str(folder)!r} holds cells with another {' and '.join(other)}: give another folder for these"
        )
    write_json(path, asdict(setting))


def fingerprint(pipe: Any) -> str:
    """A short hash of the denoiser's weights."""
    digest = hashlib.sha256()
    for value in pipe.unet.state_dict().values():
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def summary(grid: Grid, chunk: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Per rule and budget: mean and standard error (over prompts) of each figure, costs, and how many
    pictures are behind it; from the cells that are there.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rule in grid.rules:
        for budget in sorted(grid.budgets):
            held = [
                (cell, read_json(folder / cell.file))
                for cell in grid.cells(chunk)
                if (cell.rule, cell.budget) == (rule, budget) and (folder / cell.file).exists()
            ]
            if held:
                found.setdefault(rule, {})[str(budget)] = _averaged(held)
    return found


def _averaged(held: Sequence[tuple[Cell, dict[str, Any]]]) -> dict[str, float]:
    costs = ("evaluations", "seconds", "decode_seconds", "reward_seconds")
    row: dict[str, float] = {name: float(np.mean([cell[name] for _, cell in held])) for name in costs}
    for name in FIGURES:
        by_prompt: dict[tuple[int, int], list[float]] = {}
        for cell, figures in held:
            for i, value in enumerate(figures[name]):
                by_prompt.setdefault((cell.chunk, i), []).append(value)
        means = np.array([np.mean(values) for values in by_prompt.values()])
        row[name] = float(means.mean())
        row[f"{name}_se"] = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    row["pictures"] = float(sum(len(figures["roots"]) for _, figures in held))
    return row


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as a markdown table."""
    heads = "rule | budget | strict, best | score, best | strict, mean | score, mean | roots | seconds"
    lines = [f"| {heads} |", f"|{'---|' * 8}"]
    for rule, budgets in results.items():
        for budget, row in budgets.items():
            cells = [
                _percent(row, "strict_best"),
                f"{row['score_best']:.3f} ± {row['score_best_se']:.3f}",
                _percent(row, "strict_mean"),
                f"{row['score_mean']:.3f} ± {row['score_mean_se']:.3f}",
                f"{row['roots']:.1f}",
                f"{row['seconds']:.2f}",
            ]
            lines.append(f"| {' | '.join([rule, budget, *cells])} |")
    return "\n".join(lines)


def _percent(row: dict[str, float], name: str) -> str:
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_se']:.1f} %"


def bars(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """What steering must reach, with the figures: per budget, from the rules that were measured."""
    found: dict[str, dict[str, Any]] = {}
    for budget, best in results.get("best-of-n", {}).items():
        steered = {rule: results[rule][budget] for rule in ("fk", "svdd") if budget in results.get(rule, {})}
        if "fk" in steered:
            gain = steered["fk"]["strict_mean"] - best["strict_mean"]
            found[f"{budget}: FK's mean picture is 25 points above the mean of free ones"] = {
                "gain": gain,
                "met": gain >= 0.25,
            }
        if steered:
            rule, top = max(steered.items(), key=lambda item: item[1]["strict_best"])
            lead = top["strict_best"] - best["strict_best"]
            error = math.hypot(top["strict_best_se"], best["strict_best_se"])
            found[f"{budget}: the better of FK and SVDD is not below best-of-n by a standard error"] = {
                "rule": rule,
                "lead": lead,
                "error": error,
                "met": lead >= -error and (budget != "16" or lead > 0),
            }
    return found
