"""Pictures of the Shapes model by number of evaluations: stock solvers, DC-Solver, and the searched ones.

    python -m benchmarks.solver_pictures -o docs/solver_pictures.png

The same prompts and seeds everywhere; the first row is the converged picture. DC-Solver and the searched
solvers are those that ship with the package. Marks say whether a picture holds every fact of its prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.command import command, opened
from benchmarks.sheets import graded, save
from diffplug.demos.contact_sheet import Cell, contact_sheet
from diffplug.files import output_folder
from diffplug.recipe import Recipe
from diffplug.shapes import sample_prompts

Advance = Callable[[], None]
COLUMNS = {
    "ddim": "DDIM",
    "dpm++": "DPM-Solver++ 2M",
    "unipc": "UniPC",
    "dc-solver": "DC-Solver",
    "solver": "searched solver",
}


def cell(pipe: Any, prompts: Sequence[str], sampler: str, steps: int, guidance: float) -> Cell:
    """Pictures of the prompts, in order, with their marks."""
    recipe = Recipe(sampler=sampler, steps=steps, guidance=guidance)
    images = recipe.run(pipe, prompts, list(range(len(prompts)))).images
    return graded(images, prompts)


def rows(pipe: Any, prompts: Sequence[str], told: argparse.Namespace, advance: Advance) -> list[list[Cell]]:
    """The converged pictures, then a row for each number of evaluations."""
    best = cell(pipe, prompts, "ddim", told.converged, told.guidance)
    advance()
    found = [[best] * len(COLUMNS)]
    for steps in told.steps:
        found.append([])
        for sampler in COLUMNS:
            found[-1].append(cell(pipe, prompts, sampler, steps, told.guidance))
            advance()
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, samples and writes the sheet."""
    told = _parser().parse_args(arguments)
    output_folder(told.out.parent)
    pipe = opened(told.model, told.device)
    prompts = sample_prompts(told.prompts, seed=told.seed, split="test")
    with Progress(transient=True) as bars:
        task = bars.add_task("pictures", total=1 + len(told.steps) * len(COLUMNS))
        cells = rows(pipe, prompts, told, partial(bars.advance, task))
    labels = [f"converged ({told.converged} steps)", *(f"{steps} evaluations" for steps in told.steps)]
    names, footer = list(COLUMNS.values()), " / ".join(prompts)
    sheet = contact_sheet(cells, row_labels=labels, column_labels=names, footer=footer, size=64)
    save(sheet, told.out)


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="shapes")
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[5, 6, 8, 10])
    add("--converged", type=int, default=200, help="steps of the first row")
    add("--guidance", type=float, default=5.0)
    add("--prompts", type=int, default=3, help="pictures in a cell")
    add("--seed", type=int, default=0, help="of the prompts, out of the test split")
    add("-o", "--out", type=Path, default=Path("docs/solver_pictures.png"))
    return parser


if __name__ == "__main__":
    main()
