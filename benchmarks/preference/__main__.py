"""Preference tuning measured: on Shapes against naive tuning and a coin, and on a ring of eight Gaussians."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.command import command, opened
from benchmarks.preference import shapes
from diffplug.files import output_folder, write_json

RESULTS = Path(__file__).parents[1] / "results"


def run_train(told: argparse.Namespace) -> None:
    """One run on Shapes, taken up where it was interrupted."""
    for name in told.names:
        seconds = shapes.tuned(name, told.out, told.cache, told.seed, told.minutes)
        print(f"{name}: {seconds:.0f} CPU s")


def run_shapes(told: argparse.Namespace) -> None:
    """The table of all finished runs."""
    names = [f"{name}-{told.seed}" for name in told.names]
    tables = shapes.table(told.out, names, told.prompts, opened("shapes", "cpu"))
    kept = {}
    for label, rows in tables.items():
        print(f"{label}, {told.prompts} prompts:")
        for row in rows:
            gap, error = shapes.paired(row, rows[0])
            sharp = row.sharpness / rows[0].sharpness - 1
            print(
                f"  {row.name:18} strict {row.strict:5.1f} ± {row.error:.1f} ({'/'.join(f'{k:.0f}' for k in row.kinds)}) "
                f"gain {gap:+.1f} ± {error:.1f}, score {row.score:.3f}, edges {sharp:+.1%}, "
                f"diversity {row.diversity:.3f}"
            )
            kept[f"{row.name}, {label}"] = {
                **{k: v for k, v in vars(row).items() if k != "right"}, "gain": gap, "gain_error": error, "edges": sharp,
            }  # fmt: skip
    write_json(output_folder(RESULTS) / f"preference_shapes{told.tag}.json", kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = command("benchmarks.preference")
    add = parser.add_argument
    add("what", choices=RUNS)
    add("--names", nargs="+", choices=shapes.NAMES, default=list(shapes.NAMES))
    add("--prompts", type=int, default=400)
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=None)
    add("--threads", type=int, default=1)
    add("--tag", default="", help="end of the results' file name")
    add("-o", "--out", type=Path, default=Path("runs/preference"))
    add("--cache", type=Path, default=Path("runs/cache"))
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    RUNS[told.what](told)


RUNS = {"train": run_train, "shapes": run_shapes}

if __name__ == "__main__":
    main()
