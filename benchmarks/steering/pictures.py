"""Rules of steering on hard prompts of the Shapes world, at equal numbers of network evaluations.

A cell is one rule, one budget, one seed and a few prompts. Cells are kept as they come, each in its own file,
so that a run may stop at any time and go on later, or on another day with more prompts.

Free draws are shared: the first 4 of a prompt's 32 are what best of 4 would draw, so that a rule without
selections is run once, for the largest budget, and "plain" is the first draw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.steering.published import PublishedFeynmanKac
from diffplug.files import output_folder, read_json, write_json
from diffplug.recipe import Pictures, Recipe
from diffplug.registry import STEERERS
from diffplug.shapes import grade, sample_prompts

PUBLISHED = "published-fk"
FREE = ("best-of-n", "best-of-n-noise")
UNWEIGHTED = (*FREE, "more-steps", "noise-search")
RULES = (*FREE, "more-steps", "fk", "svdd", "code", "two-level", "noise-search", PUBLISHED)

_TOO_WEAK = 1e-9


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a folder have in common.

    Three objects in 5 steps without guidance are hard: a fifth of the free pictures are right. Guidance makes
    them no easier (10 steps: 26 % at 5, 37 % without), and fresh noise in few guided steps does harm that no
    selection makes good.
    """

    kind: str = "three"
    steps: int = 5
    guidance: float = 1.0
    sampler: str = "ddim"
    reward: str = "shapes"
    strength: float = 30.0
    chunk: int = 16
    weights: str = ""
    layout: int = 5


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
    """How a rule spends n * steps evaluations on a picture; steerers hand back all that they made.

    Everything else is what a person gets who names the rule: DDIM without noise for rules that copy nothing,
    noise at the scored calls for those that do. "best-of-n-noise" draws from the very law that Feynman-Kac
    selects from: it is that rule, too weak ever to select. Noise search has 3 rounds by default; here 2 or 4,
    which divide the budgets. The published bookkeeping copies after the step, and gets eta = 1 as it had it.
    """
    common: dict[str, Any] = {"label": rule, "sampler": setting.sampler, "guidance": setting.guidance}
    if rule == "more-steps":
        return Recipe(steps=min(1000, setting.steps * n), **common)
    options: dict[str, Any] = {"returns": "all"}
    particles, strength = n, None if rule in ("best-of-n", "noise-search") else setting.strength
    if rule == "best-of-n-noise":
        rule, strength = "fk", _TOO_WEAK
    if rule == PUBLISHED:
        common["eta"] = 1.0
    if rule == "noise-search":
        options["rounds"] = 2 if n < 8 else 4
        particles = max(n // options["rounds"], 1)
    return Recipe(
        steps=setting.steps,
        steer=rule,
        particles=particles,
        reward=setting.reward,
        strength=strength,
        options=options,
        **common,
    )


def measure(
    pipe: Any,
    setting: Setting,
    cell: Cell,
    prompts: Sequence[str],
    max_rows: int,
) -> dict[str, Any]:
    """Scores, verdicts and final weights of every picture made for each prompt, and what the cell cost."""
    first = cell.seed * 10**6 + cell.chunk * setting.chunk
    made = recipe(setting, cell.rule, cell.budget).run(
        pipe, prompts, [first + i for i in range(len(prompts))], max_rows=max_rows
    )
    copies = len(made.images) // len(prompts)
    grades = grade(made.images, [prompt for prompt in prompts for _ in range(copies)])
    shape = len(prompts), copies
    return {
        "score": np.asarray(grades.score, dtype=np.float64).reshape(shape).tolist(),
        "strict": np.asarray(grades.strict, dtype=bool).reshape(shape).tolist(),
        "weights": shares(made, *shape, weighted=cell.rule not in UNWEIGHTED).tolist(),
        "roots": _roots(made, *shape),
        "evaluations": made.evaluations / len(prompts),
        "seconds": made.seconds / len(prompts),
        "decode_seconds": sum(report.decode_seconds for report in made.reports) / len(prompts),
        "reward_seconds": sum(report.reward_seconds for report in made.reports) / len(prompts),
    }


def shares(made: Pictures, prompts: int, copies: int, *, weighted: bool) -> np.ndarray[Any, Any]:
    """The share of each picture in its prompt's population [prompts, copies]: what a picture is drawn by.

    weighted: by the final weights that steering left, else evenly.
    """
    if not weighted:
        return np.full((prompts, copies), 1 / copies)
    return torch.cat([report.final_log_weights for report in made.reports]).softmax(1).numpy()


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
                        spent = max(self.budgets) if rule in FREE else budget
                        if rule not in FREE or budget == min(self.budgets):
                            yield Cell(rule=rule, budget=spent, seed=seed, chunk=part)

    def size(self, cell: Cell, chunk: int) -> int:
        """How many prompts a cell has."""
        return min(chunk, self.prompts - cell.chunk * chunk)


def kept(cell: Cell, folder: Path) -> tuple[Cell, dict[str, Any]] | None:
    """The cell and what the folder holds of it; more free draws than asked for will do as well."""
    names = [cell.file]
    if cell.rule in FREE:
        names = [path.name for path in folder.glob(f"{cell.rule}-[0-9]*-{cell.seed}-{cell.chunk:03d}.json")]
    found = {int(name.removeprefix(f"{cell.rule}-").split("-")[0]): folder / name for name in names}
    for budget, path in sorted(found.items()):
        if budget >= cell.budget and path.exists():
            return replace(cell, budget=budget), read_json(path)
    return None


def missing(setting: Setting, grid: Grid, folder: Path) -> list[Cell]:
    """The cells that the folder does not hold yet, or holds for fewer prompts."""
    found = []
    for cell in grid.cells(setting.chunk):
        held = kept(cell, folder)
        if held is None or len(held[1]["roots"]) < grid.size(cell, setting.chunk):
            found.append(cell)
    return found


def run(
    pipe: Any,
    setting: Setting,
    grid: Grid,
    folder: Path,
    *,
    max_rows: int,
    clock: Any,
    at_most: int | None = None,
) -> None:
    """Measure every cell that the folder does not hold yet; ValueError for a folder of another setting.

    clock: told of the cells to come, and of each that is done. at_most: stop after this many.
    """
    register_published()
    open_folder(setting, folder)
    prompts = sample_prompts(grid.prompts, seed=0, kind=setting.kind, split="test")
    cells = missing(setting, grid, folder)
    clock.start([(cell, grid.size(cell, setting.chunk)) for cell in cells])
    for cell in cells[:at_most]:
        first = cell.chunk * setting.chunk
        part = prompts[first : first + setting.chunk]
        found = measure(pipe, setting, cell, part, max_rows)
        write_json(folder / cell.file, found)
        clock.finished(cell)


def register_published() -> None:
    """Make the published bookkeeping known by name."""
    if PUBLISHED not in STEERERS:
        STEERERS.register(PUBLISHED, PublishedFeynmanKac)


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
    """A short hash of the pipeline's weights."""
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for value in part.state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
