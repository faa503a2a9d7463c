"""What eight particles of a prompt look like: free draws, and what each rule of steering makes of them.

    python -m benchmarks.steering_sheet -o docs/steering_pictures.png

A row for each rule, a column for each prompt, and in a cell all its particles, in order; the same seeds
everywhere. Rules run with the settings that their names give, as in `benchmarks.steering`. Marks say whether
a picture holds every fact of its prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.command import command, opened
from benchmarks.sheets import graded, save
from benchmarks.steering.pictures import Setting, recipe
from diffplug.demos.contact_sheet import Cell, contact_sheet
from diffplug.files import output_folder
from diffplug.shapes import sample_prompts

ROWS = {
    "best-of-n": "free pictures",
    "fk": "Feynman-Kac, in pairs",
    "svdd": "SVDD",
    "code": "CoDe",
    "two-level": "two-level",
}


def row(pipe: Any, setting: Setting, rule: str, particles: int, prompts: Sequence[str]) -> list[Cell]:
    """All particles of each prompt under a rule."""
    images = recipe(setting, rule, particles).run(pipe, prompts, list(range(len(prompts)))).images
    own = [images[i : i + particles] for i in range(0, len(images), particles)]
    return [graded(each, [prompt] * particles) for each, prompt in zip(own, prompts, strict=True)]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, samples and writes the sheet."""
    told = _parser().parse_args(arguments)
    output_folder(told.out.parent)
    pipe = opened(told.model, told.device)
    names = ("kind", "steps", "guidance", "strength")
    setting = Setting(**{name: getattr(told, name) for name in names})
    prompts = sample_prompts(told.prompts, seed=told.seed, kind=told.kind, split="test")
    with Progress(transient=True) as bars:
        cells = [row(pipe, setting, rule, told.particles, prompts) for rule in bars.track(ROWS)]
    sheet = contact_sheet(
        cells, row_labels=list(ROWS.values()), column_labels=prompts, size=64,
        footer=f"{told.particles} particles, DDIM in {told.steps} steps, guidance {told.guidance:g}, "
        f"strength {told.strength:g}",
    )  # fmt: skip
    save(sheet, told.out)


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="shapes")
    add = parser.add_argument
    usual = Setting()
    add("--kind", choices=("one", "two", "relation", "three", "mixed"), default=usual.kind)
    add("--steps", type=int, default=usual.steps)
    add("--guidance", type=float, default=usual.guidance)
    add("--strength", type=float, default=usual.strength)
    add("--particles", type=int, default=8)
    add("--prompts", type=int, default=2)
    add("--seed", type=int, default=1, help="of the prompts, out of the test split")
    add("-o", "--out", type=Path, default=Path("docs/steering_pictures.png"))
    return parser


if __name__ == "__main__":
    main()
