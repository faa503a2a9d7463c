"""Few-step solvers against the converged result: ours, searched, beside every multistep solver of Diffusers.

    python -m benchmarks.solvers                                  the 16-d mixture at guidance 7.5, 1 and 0
    python -m benchmarks.solvers --model shapes --fresh 200 --truth 200 --shipped

Searches on one set of pairs of noise and prompt, chooses on a second, and prints mean and 95th percentile of
the squared error of final samples on a third that neither has seen. The Diffusers schedulers run their own
code. The mixture at guidance 1 is the component of the prompt alone, at 0 the whole mixture without a prompt.
On Shapes the share of pictures that are right in every fact is counted too, and --shipped judges the solvers
that `benchmarks.shapes_schedules` has searched. Results are JSON, written after every number of evaluations;
the plot is drawn from them (`python -m benchmarks.solver_plot`).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.command import command
from benchmarks.solver_models import NODES, Bench, MixtureBench, PipelineBench
from benchmarks.solver_peers import PEERS
from diffplug.files import output_folder, read_json, write_json
from diffplug.samplers.library import shipped_ratios, shipped_schedules
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.leader import Callbacks, Problems
from diffplug.samplers.search.stages import FITS, run_stages

RESULTS = Path(__file__).parent / "results"
BARS: dict[tuple[str, float], dict[str, float]] = {
    ("mixture", 7.5): {"DC-Solver": 0.5, "best stage": 0.1},
    ("mixture", 1.0): {"best stage": 0.3},
    ("mixture", 0.0): {"best stage": 0.3},
    ("shapes", 5.0): {"DC-Solver": 0.8, "best stage": 0.5},
}
"""Of the error of the best Diffusers scheduler, at every number of evaluations (Shapes: at 5 and 6)."""

Row = dict[str, Any]
Say = Callable[[str], None]


Ours = Sequence[tuple[str, SolverSchedule, dict[str, Any]]]
"""Name, schedule and cost of solvers of ours; the one named "given" is what a person gets."""


def compare(
    bench: Bench, steps: int, find: Callable[[], Ours], say: Say, peers: Sequence[Row] = ()
) -> tuple[list[Row], Ours]:
    """A row for each solver: errors on the fresh pairs, and what those that `find` gives have cost.

    peers: rows of Diffusers' solvers that are known already.
    """
    rows = list(peers)
    for name in () if rows else bench.peers():
        say(name)
        rows.append({"solver": name, "family": PEERS[name].family, **bench.peer(name, steps)})
    found = find()
    say("judging")
    for name, schedule, cost in found:
        rows.append({"solver": name, "family": "ours", **bench.ours(schedule), **cost})
    return rows, found


def searched(bench: Bench, steps: int, stages: Sequence[str], say: Say) -> Ours:
    """Return what every stage of a search finds, and what the search gives."""
    with bench.searching():
        problems = Problems(bench.train, bench.held_out, tail=bench.tail)
        found = run_stages(problems, steps, NODES, stages=stages, callbacks=Callbacks(on_stage=say))
    ours = []
    for result in found.stages:
        cost = {"evaluations": result.evaluations, "seconds": result.seconds, "accepted": result.accepted}
        cost["amplification"] = result.amplification
        ours.append(("DC-Solver" if result.name == "ratios" else result.name, result.schedule, cost))
    cost = {name: sum(getattr(each, name) for each in found.stages) for name in ("evaluations", "seconds")}
    return [*ours, ("given", found.schedule, cost)]


def shipped(model: str, steps: int, guidance: float) -> Ours:
    """What comes with the package: the ratios for these steps and this guidance, and the solver."""
    kinds = {"DC-Solver": shipped_ratios(model), "given": shipped_schedules(model)}
    ours = []
    for name, schedules in kinds.items():
        for each in schedules:
            if each.nfe == steps and each.meta["guidance_scale"] == guidance:
                cost = {key: each.meta[key] for key in ("evaluations", "seconds") if key in each.meta}
                ours.append((name, each, cost))
    if not ours:
        raise ValueError(
            f"nothing is shipped for {steps} steps at guidance {guidance:g}: leave --shipped out"
        )
    return ours


def ratios_to_stock(rows: Sequence[Row]) -> dict[str, float]:
    """Of the best Diffusers scheduler's mean error: DC-Solver, the best stage, what the search gives."""
    stock = min(row["mean"] for row in rows if row["family"] != "ours")
    ours = {row["solver"]: row["mean"] / stock for row in rows if row["family"] == "ours"}
    told = {name: ours[name] for name in ("DC-Solver", "given") if name in ours}
    return {**told, "best stage": min(ours.values())}


def table(steps: int, rows: Sequence[Row]) -> str:
    """Markdown, with the ratio to the best Diffusers scheduler."""
    best = min(row["mean"] for row in rows if row["family"] != "ours")
    strict = "strict | " if "strict" in rows[0] else ""
    lines = [
        f"| {steps} evaluations | mean | 95 % | of the best stock | {strict}search: evaluations | seconds |",
        f"|---|---|---|---|{'---|' * bool(strict)}---|---|",
    ]
    for row in rows:
        cells = [row["solver"], f"{row['mean']:.2e}", f"{row['p95']:.2e}", f"{row['mean'] / best:.3f}"]
        cells += [f"{row['strict']:.1%}"] if strict else []
        cells += [str(row["evaluations"]), f"{row['seconds']:.0f}"] if "seconds" in row else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(model: str, guidance: float, steps: int, rows: Sequence[Row]) -> list[str]:
    """A line for each bar that is set for this model and guidance."""
    if model == "shapes" and steps > 6:
        return []
    reached = ratios_to_stock(rows)
    return [
        f"{steps} evaluations, {name}: {reached[name]:.3f} of the best stock, bar {bar:g}: "
        + ("reached" if reached[name] <= bar else "MISSED")
        for name, bar in BARS.get((model, guidance), {}).items()
        if name in reached
    ]


def measure(bench: Bench, told: argparse.Namespace, guidance: float, bars: Progress, path: Path) -> None:
    """Every number of evaluations, printed as it comes and written at once.

    With --resume, those are kept that the file has for the same setting; what ships is judged again.
    """
    document = {"setting": setting(bench, told, guidance), "floor": None, "results": {}}
    if told.resume and path.exists() and (kept := read_json(path))["setting"] == document["setting"]:
        document = kept
    results: dict[str, Any] = document["results"]
    task = bars.add_task("", total=len(told.steps))
    for steps in told.steps:
        known = results.get(str(steps), {"rows": []})["rows"]
        if known and not told.shipped:
            bars.advance(task)
            continue

        def say(stage: str, steps: int = steps) -> None:
            bars.update(task, description=f"guidance {guidance:g}, {steps} evaluations: {stage}")

        find = partial(searched, bench, steps, told.stages, say)
        if told.shipped:
            find = partial(shipped, told.model, steps, guidance)
        rows, found = compare(bench, steps, find, say, [row for row in known if row["family"] != "ours"])
        reached = ratios_to_stock(rows)
        results[str(steps)] = {"rows": rows, "of the best stock": reached}
        document["floor"] = document["floor"] or bench.floor()
        write_json(path, document)
        if told.schedules:
            found[-1][1].save(output_folder(told.schedules) / f"{steps}-{guidance:g}.json")
        lines = [table(steps, rows), "", *verdict(told.model, guidance, steps, rows), ""]
        bars.console.print("\n".join(lines), markup=False, soft_wrap=True)
        bars.advance(task)
    bars.remove_task(task)


def setting(bench: Bench, told: argparse.Namespace, guidance: float) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "model": Path(told.model).name, "weights": bench.weights, "guidance": guidance, "pairs": told.pairs,
        "held out": held_out(told), "fresh": told.fresh, "truth": told.truth,
        "stages": "shipped" if told.shipped else told.stages,
    }  # fmt: skip


def held_out(told: argparse.Namespace) -> int:
    return int(told.held_out or (400 if told.model == "mixture" else told.pairs))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches and measures, prints tables, writes JSON and the schedules found."""
    told = _parser().parse_args(arguments)
    guidances = told.guidance or ([7.5, 1.0, 0.0] if told.model == "mixture" else [5.0])
    folder = output_folder(told.results)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    with Progress(transient=True) as bars:
        for guidance in guidances:
            sizes = (guidance, told.pairs, held_out(told), told.fresh, told.truth)
            if told.model == "mixture":
                bench: Bench = MixtureBench(*sizes)
            else:
                bench = PipelineBench(told.model, *sizes, device=told.device, folder=told.truths)
            measure(
                bench, told, guidance, bars, folder / f"solvers_{Path(told.model).name}_{guidance:g}.json"
            )


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="mixture", models="mixture, shapes, or the folder of such a pipeline")
    add = parser.add_argument
    add("--guidance", type=float, nargs="+", help="default: 7.5 1 0 for the mixture, 5 for a pipeline")
    add("--steps", type=int, nargs="+", default=[5, 6, 8, 10])
    add("--pairs", type=int, default=64, help="to fit to")
    add("--held-out", type=int, help="to choose by; default: 400 for the mixture, else as many as to fit to")
    add("--fresh", type=int, default=400, help="to judge by at the end")
    add("--truth", type=int, default=1000, help="evaluations of the converged result")
    add("--stages", nargs="+", default=list(FITS), choices=FITS)
    add("--results", type=Path, default=RESULTS, help="folder for solvers_MODEL_GUIDANCE.json")
    add("--truths", type=Path, help="folder for the converged latents of pipelines; default: the cache")
    add("--shipped", action="store_true", help="judge what comes with the package, instead of searching")
    add("--resume", action="store_true", help="keep what the file has, but for what ships")
    add("--schedules", type=Path, help="folder for the schedules found")
    return parser


if __name__ == "__main__":
    main()
