"""Preference tuning measured: on Shapes against naive tuning and a coin, and on a ring of eight Gaussians."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command, opened
from benchmarks.preference import ring, shapes
from diffplug.files import output_folder, write_json

RESULTS = Path(__file__).parents[1] / "results"


def run_train(told: argparse.Namespace) -> None:
    """Runs on Shapes, each taken up where it was interrupted."""
    for name, seed in product(told.names, told.seed):
        seconds = shapes.tuned(name, told.out, told.cache, seed, told.minutes)
        print(f"{name}-{seed}: {seconds:.0f} CPU s")


def run_shapes(told: argparse.Namespace) -> None:
    """The table of all finished runs."""
    names = [f"{name}-{seed}" for name, seed in product(told.names, told.seed)]
    tables = shapes.table(told.out, names, told.prompts, opened("shapes", "cpu"))
    kept = {}
    for label, rows in tables.items():
        print(f"{label}, {told.prompts} prompts:")
        for row in rows:
            gap, error = shapes.paired(row, rows[0])
            sharp = row.sharpness / rows[0].sharpness - 1
            print(
                f"  {row.name:18} strict {row.strict:5.1f} ± {row.error:.1f} "
                f"({'/'.join(f'{k:.0f}' for k in row.kinds)}) gain {gap:+.1f} ± {error:.1f}, "
                f"score {row.score:.3f}, edges {sharp:+.1%}, "
                f"diversity {row.diversity:.3f}"
            )
            kept[f"{row.name}, {label}"] = {
                **{k: v for k, v in vars(row).items() if k != "right"},
                "gain": gap, "gain_error": error, "edges": sharp,
            }  # fmt: skip
        for name, (mean, error, count) in shapes.over_seeds(rows).items():
            print(f"  {name:18} mean gain of {count} seeds {mean:+.1f} ± {error:.1f}")
            kept[f"{name}, {label}, {count} seeds"] = {"gain": mean, "gain_error": error}
    write_json(output_folder(RESULTS) / f"preference_shapes{told.tag}.json", kept)


def run_sheet(told: argparse.Namespace) -> None:
    """Pictures of the same prompts and seeds: a row for the start model, then one for each run."""
    from diffplug.training.validation import save_sheet

    found = shapes.pictures(told.out, told.names, told.seed[0], opened("shapes", "cpu"))
    save_sheet(found, told.out / "sheet.png")
    print(told.out / "sheet.png")


def run_ring(told: argparse.Namespace) -> None:
    """Sharpness on the ring, with the bars of the method."""
    found = ring.sharpness(told.out / "ring")
    for name, r in found.items():
        print(
            f"{name:22} right {r.right:.3f}, on a mode {r.on:.3f}, reward {r.reward:.3f}, "
            f"distance {r.distance:.3f}"
        )
    start, held = found["student"], found["PSO, anchor, 800"]
    bars = {
        "naive tuning leaves the modes": all(found[f"naive, {n}"].on < 0.6 for n in (100, 1000)),
        "PSO with anchor doubles the reward": held.reward >= 2 * start.reward,
        "and stays on the modes": abs(held.on - start.on) <= 0.02,
        "without anchor it leaves them": found["PSO, no anchor, 400"].on < 0.6,
    }
    _told("ring", {"rows": {name: vars(r) for name, r in found.items()}, "bars": bars})


def run_detail(told: argparse.Namespace) -> None:
    """Step-wise against trajectory preference, with labels that mix layout and detail."""
    found = ring.detail(told.seeds, told.out / "detail")
    for name, values in found.items():
        print(f"{name:22} {' '.join(f'{value:.4f}' for value in values)}")
    gain = {name: max(values[-1], 1e-9) for name, values in found.items()}
    bars = {
        "SPO does not mind layout": gain["SPO, A = 1"] >= 0.8 * gain["SPO, A = 0"],
        "trajectories do": gain["trajectory, A = 1"] <= 0.7 * gain["trajectory, A = 0"],
        "SPO gains 1.5 times as much": gain["SPO, A = 0"] >= 1.5 * gain["trajectory, A = 0"],
    }
    _told("detail", {"gains": found, "bars": bars, "seeds": told.seeds})


def _told(name: str, values: dict[str, Any]) -> None:
    for bar, met in values["bars"].items():
        print(f"{bar}: {'met' if met else 'NOT MET'}")
    write_json(output_folder(RESULTS) / f"preference_{name}.json", values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = command("benchmarks.preference")
    add = parser.add_argument
    add("what", choices=RUNS)
    add("--names", nargs="+", choices=shapes.NAMES, default=list(shapes.NAMES))
    add("--prompts", type=int, default=400)
    add("--seed", type=int, nargs="+", default=[0])
    add("--seeds", type=int, default=3, help="of the toy of details")
    add("--minutes", type=float, default=None)
    add("--threads", type=int, default=1)
    add("--tag", default="", help="end of the results' file name")
    add("-o", "--out", type=Path, default=Path("runs/preference"))
    add("--cache", type=Path, default=Path("runs/cache"))
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    RUNS[told.what](told)


RUNS = {"train": run_train, "shapes": run_shapes, "sheet": run_sheet, "ring": run_ring, "detail": run_detail}

if __name__ == "__main__":
    main()
