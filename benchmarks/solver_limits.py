"""Where the error of few evaluations comes from, on Shapes.

    python -m benchmarks.solver_limits --steps 5 6

For every number of evaluations: the solver is put on the converged states at its first k nodes and left alone
after; what remains of its error arises in the steps that follow. And how far the converged result moves when
a little of the start noise is other noise: a solver whose first step is off by as much cannot come back.
Pairs are of the test split; mean (and median) squared errors are printed, shares of right pictures are in the
JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.command import command
from benchmarks.solver_models import NODES, PipelineBench
from diffplug.files import output_folder, write_json
from diffplug.samplers.library import shipped_folder, shipped_schedules
from diffplug.samplers.schedule.presets import ddim, dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.pipeline_problem import PipelineProblem

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def solvers(steps: int) -> dict[str, SolverSchedule]:
    """Two stock solvers, and what ships for these evaluations, by name."""
    shipped = shipped_schedules("shapes") if any(shipped_folder("shapes").glob("solver-*.json")) else []
    ours = [each for each in shipped if each.nfe == len(each.steps) == steps]
    stock = {"DDIM": ddim(steps, NODES), "DPM-Solver++ 2M": dpmpp(steps, NODES)}
    return {**stock, **({"searched": ours[0]} if ours else {})}


def rows(bench: PipelineBench, steps: int) -> Iterator[Row]:
    """A row for each solver and each k = 1 ... N nodes at converged states."""
    problem = bench.fresh
    assert isinstance(problem, PipelineProblem)  # noqa: S101 - a pipeline's bench has no others
    for name, schedule in solvers(steps).items():
        states = problem.reference_states(schedule)
        for k in range(1, steps + 1):
            final = problem.final_from(schedule, states[:k])
            yield {"steps": steps, "solver": name, "converged": k, **bench.judged(final, problem)}


def moved(bench: PipelineBench, share: float) -> Row:
    """How far converged samples move when `share` of the start noise's variance is other noise."""
    problem = bench.fresh
    assert isinstance(problem, PipelineProblem)  # noqa: S101 - a pipeline's bench has no others
    start = problem.run(dpmpp(1, NODES, order=1)).states[0]
    other = np.random.default_rng(0).standard_normal(start.shape)
    mixed = np.sqrt(1 - share) * start + np.sqrt(share) * other
    latents = torch.from_numpy(mixed).float().reshape(-1, *problem.sample_shape).to(bench.pipe.device)
    rollouts = replace(problem.rollouts, options={"latents": latents}, max_rows=len(latents))
    return {"share": share, **bench.judged(replace(problem, rollouts=rollouts).reference, problem)}


def table(steps: int, found: Sequence[Row]) -> str:
    """Markdown: a row for each solver, mean and median error over k."""
    heads = [f"{k} converged" for k in range(1, steps + 1)]
    lines = [f"| {steps} evaluations | {' | '.join(heads)} |", f"|{'---|' * (steps + 1)}"]
    for name in dict.fromkeys(row["solver"] for row in found):
        cells = [f"{row['mean']:.3f} ({row['median']:.3f})" for row in found if row["solver"] == name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, prints mean (and median) errors, writes JSON after each of them."""
    told = _parser().parse_args(arguments)
    output_folder(told.json.parent)
    bench = PipelineBench(
        told.model, told.guidance, 1, 1, told.fresh, told.truth, device=told.device, folder=told.truths
    )
    converged = bench.judged(bench.fresh.reference, bench.fresh)
    document: dict[str, Any] = {"setting": {"model": bench.weights}, "variance": _variance(bench)}
    document["converged strict"] = converged["strict"]
    document["results"], document["moved"] = {}, []
    with Progress(transient=True) as bars:
        for steps in bars.track(told.steps, description="evaluations"):
            document["results"][steps] = found = list(rows(bench, steps))
            bars.console.print(table(steps, found) + "\n", markup=False, soft_wrap=True)
            write_json(told.json, document)
        for share in bars.track(told.shares, description="start noise"):
            document["moved"].append(moved(bench, share))
            line = f"{share:g} of the start noise's variance: moved by {document['moved'][-1]['mean']:.3f}"
            bars.console.print(line, markup=False)
            write_json(told.json, document)
    print(f"variance of converged latents: {document['variance']:.3f}")


def _variance(bench: PipelineBench) -> float:
    return float(bench.fresh.reference.var(axis=0).mean())


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="shapes")
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[5, 6])
    add("--guidance", type=float, default=5.0)
    add("--fresh", type=int, default=64, help="test pairs")
    add("--truth", type=int, default=200, help="evaluations of the converged result")
    add("--shares", type=float, nargs="+", default=[0.001, 0.01, 0.05], help="of the start noise's variance")
    add("--truths", type=Path, help="folder for converged latents")
    add("--json", type=Path, default=RESULTS / "solver_limits.json")
    return parser


if __name__ == "__main__":
    main()
