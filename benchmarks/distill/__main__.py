"""Few-step students, measured.

    python -m benchmarks.distill shapes                 what ships, against stock and searched solvers
    python -m benchmarks.distill bars                   students trained now, within ten CPU minutes each
    python -m benchmarks.distill keep                   a student that keeps guidance and negative prompts
    python -m benchmarks.distill toy --seeds 3          segmented consistency on eight Gaussians
    python -m benchmarks.distill one-step               score distillation with and without its regression
    python -m benchmarks.distill contest --seconds 60   objectives at equal seconds
    python -m benchmarks.distill overhead               what an update costs outside the network

Results go to benchmarks/results/distill_*.json. Pictures: picture i of `sample_prompts(n, seed=0,
split="test")` from seed i, a quarter of each kind; bfloat16 autocast; standard errors over pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.command import command, opened
from benchmarks.distill import shapes, toy, training
from diffplug.cli.console import print_table
from diffplug.files import output_folder, write_json

RESULTS = Path(__file__).parents[1] / "results"
FIRM = {"student 4": 68.0, "student 4, eta 1": 74.0, "student 2": 48.0, "student 1": 8.0, "student 8": 70.0}


def shown(rows: Sequence[shapes.Row]) -> None:
    """Print the rows as a table."""
    names = ["sampler", "rows", "strict %", "one/two/rel/three", "score", "RMSE", "edges", "CPU s"]
    cells = [
        [
            r.name,
            str(r.rows),
            f"{r.strict:.1f} ± {r.strict_error:.1f}",
            "/".join(f"{k:.0f}" for k in r.kinds),
            f"{r.score:.3f} ± {r.score_error:.3f}",
            f"{r.rmse:.3f}",
            f"{r.edge:.2f}",
            f"{r.seconds:.1f}",
        ]
        for r in rows
    ]
    print_table(names, cells, right=names[1:])


def kept(name: str, values: Any) -> None:
    """Write results, and say where they are."""
    path = output_folder(RESULTS) / f"distill_{name}.json"
    write_json(path, json.loads(json.dumps(values)))
    print(path)


def run_shapes(told: argparse.Namespace) -> None:
    """What ships."""
    pipe = opened("shapes", "cpu")
    test, teacher = shapes.prepared(pipe, told.prompts)
    rows = [teacher, *(shapes.of_solver(pipe, "DDIM", n, test) for n in (1, 2, 4, 8))]
    rows += [shapes.of_solver(pipe, name, 4, test) for name in ("DPM++2M", "UniPC")]
    rows += [shapes.of_searched(pipe, n, test) for n in (5, 8)]
    rows += [shapes.of_student(pipe, "shapes", n, test) for n in (1, 2, 4)]
    rows += [shapes.of_student(pipe, "shapes", n, test, eta=1.0) for n in (2, 4)]
    shown(rows)
    kept("shapes", [vars(r) for r in rows])


def run_bars(told: argparse.Namespace) -> None:
    """Students trained now, with the firm bars."""
    pipe = opened("shapes", "cpu")
    test, _ = shapes.prepared(pipe, told.prompts)
    found = training.bars(pipe, test, told.out, told.cache)
    shown([r for r, _ in found])
    for r, seconds in found:
        met = "met" if r.strict >= FIRM.get(r.name, 0) else "NOT MET"
        print(f"{r.name}: {seconds:.0f} CPU s, bar {FIRM.get(r.name, 0):g} %: {met}")
    kept("bars", [{**vars(r), "training_seconds": seconds} for r, seconds in found])


def run_keep(told: argparse.Namespace) -> None:
    """A student that keeps guidance, beside DDIM with as many rows of the network."""
    pipe = opened("shapes", "cpu")
    test, _ = shapes.prepared(pipe, told.prompts)
    found = training.keeping(pipe, test, told.out, told.cache)
    shown([shapes.of_solver(pipe, "DDIM", 4, test), *(r for r, _ in found)])
    kept("keep", [{**vars(r), "training_seconds": seconds} for r, seconds in found])


def run_toy(told: argparse.Namespace) -> None:
    """Segmented consistency on the toy."""
    tables = toy.consistency(told.out / "toy", told.seeds)
    for name, found in tables.items():
        cells = found if not isinstance(found, dict) else {n: _pair(v) for n, v in found.items()}
        print(f"{name}: {cells}")
    met = toy.met(tables)
    print("\n".join(f"{name}: {'met' if good else 'NOT MET'}" for name, good in met.items()))
    kept("toy", {"tables": tables, "met": met, "seeds": told.seeds})


def _pair(value: Any) -> str:
    return f"{value[0]:.3f}/{value[1]:.3f}" if isinstance(value, tuple) else str(value)


def run_one_step(told: argparse.Namespace) -> None:
    """The one-step finish on the toy."""
    rows = toy.one_step(told.out / "toy")
    for name, found in rows.items():
        print(name, {key: round(value, 3) for key, value in found.items()})
    kept("one_step", rows)


def run_contest(told: argparse.Namespace) -> None:
    """Objectives at equal seconds; every row is kept as it comes, and the next run goes on from them."""
    pipe, path = opened("shapes", "cpu"), RESULTS / "distill_contest.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", []) if before.get("seconds") == told.seconds else []
    known = {(r["steps"], r["objective"], r["filtered"], r["seed"]) for r in rows}
    test, _ = shapes.prepared(pipe, told.prompts)
    wanted = {"seconds": told.seconds, "seeds": told.seeds, "steps": told.steps, "known": known}
    for r in training.contest(pipe, test, told.out, told.cache, **wanted):
        rows.append(r)
        print(f"{r['objective']}, {r['name']}, {'right' if r['filtered'] else 'all'}, seed {r['seed']}: "
              f"{r['strict']:.1f} ± {r['strict_error']:.1f}, score {r['score']:.3f}", flush=True)  # fmt: skip
        kept("contest", {"seconds": told.seconds, "rows": rows})
    _table(rows)


def _table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the mean over seeds of every objective, and its standard error over them."""
    cells: dict[tuple[int, str, bool], list[float]] = {}
    for r in rows:
        cells.setdefault((r["steps"], r["objective"], r["filtered"]), []).append(r["strict"])
    print_table(
        ["steps", "objective", "trajectories", "strict %", "seeds"],
        [
            [str(k), name, "right" if right else "all", f"{mean(x):.1f} ± {_error(x):.1f}", str(len(x))]
            for (k, name, right), x in sorted(cells.items(), key=lambda c: (c[0][0], -mean(c[1])))
        ],
        right=["steps", "strict %", "seeds"],
    )


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def run_overhead(told: argparse.Namespace) -> None:
    """An update outside the network."""
    found = training.overhead(told.cache, told.out / "overhead")
    print(f"{found['update_seconds']:.3f} CPU s an update, {found['outside']:.1%} of it outside the network")
    kept("overhead", found)


RUNS = {
    "shapes": run_shapes,
    "bars": run_bars,
    "keep": run_keep,
    "toy": run_toy,
    "one-step": run_one_step,
    "contest": run_contest,
    "overhead": run_overhead,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = command("benchmarks.distill")
    add = parser.add_argument
    add("what", choices=RUNS)
    add("--prompts", type=int, default=400)
    add("--seeds", type=int, default=3)
    add("--seconds", type=float, default=60.0, help="of training, for each student of the contest")
    add("--steps", type=int, nargs="+", default=[4], help="of the contest")
    add("--threads", type=int, default=1)
    add("-o", "--out", type=Path, default=Path("runs/distill"))
    add("--cache", type=Path, default=Path("runs/cache"))
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    RUNS[told.what](told)


if __name__ == "__main__":
    main()
