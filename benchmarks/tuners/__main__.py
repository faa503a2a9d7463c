"""Tuners, measured.

    python -m benchmarks.tuners exact              what must hold exactly (the tests of SaRA)
    python -m benchmarks.tuners memory             bytes and seconds of a step, on 81 M weights and on Shapes
    python -m benchmarks.tuners toy --seeds 2      which weights forget least, on Gaussians
    python -m benchmarks.tuners probe              what zeroing the smallest weights of Shapes costs
    python -m benchmarks.tuners star --method sara --seed 0     a new concept, and what it costs the old ones
    python -m benchmarks.tuners outline            a style by each tuner, with a sheet of pictures

Results go to benchmarks/results/tuners.json. Everything runs on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command, opened
from benchmarks.tuners import memory, outline, star, toy
from diffplug.cli.console import print_table
from diffplug.files import output_folder, read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "tuners.json"


def kept(name: str, value: Any) -> None:
    """Write a result beside the others."""
    output_folder(RESULTS.parent)
    found = read_json(RESULTS) if RESULTS.exists() else {}
    write_json(RESULTS, {**found, name: value})


def bar(what: str, value: float, most: float) -> None:
    """Print a figure with its bar."""
    print(f"{what}: {value:.3g}, bar {most:g}: {'reached' if value <= most else 'NOT MET'}")


def run_exact(told: argparse.Namespace) -> None:
    """Run the tests of exactness."""
    import pytest

    folders = [str(Path(__file__).parents[2] / "tests" / part) for part in ("training/sara", "sara")]
    sys.exit(pytest.main(["-q", *folders]))


def run_memory(told: argparse.Namespace) -> None:
    """Memory by allocator events."""
    rows = {}
    for setup in ("ii", "i"):
        costs = {m: memory.measured(m, setup) for m in ("full", "dense", "lora", "sara")}
        shown(f"set-up ({setup})", list(costs.values()))
        rows[setup] = [asdict(one) for one in costs.values()]
        bar(f"({setup}) SaRA's peak, MiB", costs["sara"].peak, memory.BARS[setup])
        bar(f"({setup}) CPU seconds of full", costs["sara"].seconds / costs["full"].seconds, 1.15)
    for batch, share in ((4, 0.6), (1, 0.5)):
        costs = {m: on_shapes(m, batch) for m in ("full", "dense", "lora", "sara")}
        shown(f"Shapes, batch {batch}", list(costs.values()))
        rows[f"shapes {batch}"] = [asdict(one) for one in costs.values()]
        bar("total of full", costs["sara"].peak / costs["full"].peak, share)
        if batch == 1:
            sara, dense = ((costs[m].peak - costs[m].persistent) for m in ("sara", "dense"))
            bar("the step's peak of that of dense gradients", sara / dense, 0.75)
    kept("memory", rows)


def on_shapes(method: str, batch: int) -> memory.Cost:
    """Return the cost of a step on the Shapes U-Net, 5 % of its weights, LoRA of rank 8."""
    unet = opened("shapes", "cpu").unet
    torch.manual_seed(0)
    x, t = torch.randn(batch, 4, 16, 16), torch.full((batch,), 500)
    states = torch.randn(batch, 32, unet.config.cross_attention_dim)
    return memory.cost_of(
        method, unet, lambda: unet(x, t, states)[0].square().mean(), density=0.05, rank=8, steps=1
    )


def shown(title: str, costs: Sequence[memory.Cost]) -> None:
    """Print costs as a table."""
    names = ["method", "trained", "persistent MiB", "peak MiB", "CPU s a step"]
    cells = [
        [c.method, f"{c.trained:,}", f"{c.persistent:.1f}", f"{c.peak:.1f}", f"{c.seconds:.2f}"]
        for c in costs
    ]
    print(f"\n{title}")
    print_table(names, cells, right=names[1:])


def run_toy(told: argparse.Namespace) -> None:
    """The toy."""
    rows = toy.table(told.seeds, tuple(told.rates))
    kept("toy", [asdict(row) for row in rows])
    for lr in told.rates:
        means = {c: _mean([r for r in rows if r.choice == c and r.lr == lr]) for c in toy.CHOICES}
        print(f"lr {lr:g}: " + ", ".join(f"{c} old {o:.3f} new {n:.3f}" for c, (o, n) in means.items()))
        if lr == 5e-4:
            bar("smallest / random, old loss", means["magnitude"][0] / means["random"][0], toy.BAR)
    bar("zeroing the smallest 6 %", abs(toy.probed()), 0.01)


def _mean(rows: Sequence[toy.Forgot]) -> tuple[float, float]:
    return sum(r.old for r in rows) / len(rows), sum(r.new for r in rows) / len(rows)


def run_probe(told: argparse.Namespace) -> None:
    """Zeroing the smallest weights of Shapes."""
    probes = star.probed()
    kept("probe", [asdict(one) for one in probes])
    names = ["smallest", "threshold", "old loss", "change"]
    cells = [[f"{p.density:.0%}", f"{p.threshold:.4f}", f"{p.loss:.4f}", f"{p.change:+.1%}"] for p in probes]
    print_table(names, cells, right=names[1:])
    bar("zeroing the smallest 5 %", abs(probes[0].change), 0.01)


def run_star(told: argparse.Namespace) -> None:
    """One training on stars."""
    run = star.trained(told.method, told.seed, told.target, told.updates)
    print(
        f"{run.method}, seed {run.seed}: {run.updates} updates, new {run.curve[-1][1]:.4f}, old "
        f"{run.curve[-1][2]:.4f}, stars {run.star:.1%}, ordinary {run.ordinary:.1%}, "
        f"{run.cpu_seconds:.0f} CPU s"
    )
    found = read_json(RESULTS).get("star", {}) if RESULTS.exists() else {}
    kept("star", {**found, f"{run.method} {run.seed} {told.target:g}": asdict(run)})


def run_outline(told: argparse.Namespace) -> None:
    """The sheet of the style."""
    rows = [outline.styled(method, told.updates) for method in ("base", "round trip", *outline.METHODS)]
    kept("outline", [row.to_json() for row, _ in rows])
    outline.sheet(rows, told.out)
    print(told.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    torch.set_num_threads(1)
    parser = command(__name__)
    kinds = parser.add_subparsers(required=True)
    for name, run in (("exact", run_exact), ("memory", run_memory), ("probe", run_probe)):
        kinds.add_parser(name).set_defaults(run=run)
    one = kinds.add_parser("toy")
    one.add_argument("--seeds", type=int, default=2)
    one.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    one.set_defaults(run=run_toy)
    one = kinds.add_parser("star")
    one.add_argument("--method", choices=list(star.METHODS), default="sara")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--target", type=float, default=0.036, help="loss on held-out star scenes to stop at")
    one.add_argument("--updates", type=int, default=150, help="most updates, and the length of the cosine")
    one.set_defaults(run=run_star)
    one = kinds.add_parser("outline")
    one.add_argument("--updates", type=int, default=100)
    one.add_argument("--out", type=Path, default=Path("out/tuning.png"))
    one.set_defaults(run=run_outline)
    told = parser.parse_args(arguments)
    told.run(told)


if __name__ == "__main__":
    main()
