"""Few-step solvers against the converged result: ours, searched, beside every multistep solver of Diffusers.

    python -m benchmarks.solvers --model mixture --guidance 7.5
    python -m benchmarks.solvers --model shapes --guidance 5 --pairs 64 --fresh 200

Searches on one set of pairs, chooses on a second, and prints mean and 95th percentile of the squared error of
final samples on a third that neither has seen. The Diffusers schedulers run themselves, on their own code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from diffplug import load
from diffplug.files import output_folder, write_json
from diffplug.samplers.nodes import Nodes
from diffplug.samplers.noise_levels import NoiseLevels
from diffplug.samplers.search.climb import RUNGS, Climb, climb
from diffplug.samplers.search.problem import Errors, ModelProblem, PipelineProblem, Problem, errors
from diffplug.samplers.search.trials import Trials
from diffplug.shapes import sample_prompts
from diffplug.testing.guided_mixture import GuidedMixture

RESULTS = Path(__file__).parent / "results"
NODES = Nodes(kind="name", name="linspace", final="sigma_min")
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACED = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}

STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM (trailing)": ("DDIMScheduler", TRAILING),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", SPACED),
    "DPM-Solver++ 2M, Karras": ("DPMSolverMultistepScheduler", {**SPACED, "use_karras_sigmas": True}),
    "DPM-Solver++ 2M, log-uniform": ("DPMSolverMultistepScheduler", {**SPACED, "use_lu_lambdas": True}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {**SPACED, "solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", SPACED),
    "UniPC-2, no first corrector": ("UniPCMultistepScheduler", {**SPACED, "disable_corrector": [0]}),
    "UniPC-3": ("UniPCMultistepScheduler", {**SPACED, "solver_order": 3}),
    "DEIS-2": ("DEISMultistepScheduler", {"timestep_spacing": "linspace"}),
    "DEIS-3": ("DEISMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 3}),
}  # fmt: skip


@dataclass
class Bench:
    """Three sets of pairs of one model, and how a Diffusers scheduler does on the third."""

    train: Problem
    held_out: Problem
    fresh: Problem

    def stock(self, name: str, steps: int) -> Errors:
        class_name, config = STOCK[name]
        off = self.sample(getattr(diffusers, class_name), config, steps) - self.fresh.truth
        return Errors(np.square(off).mean(axis=1))

    def sample(self, cls: Any, config: dict[str, Any], steps: int) -> Any:
        raise NotImplementedError


class MixtureBench(Bench):
    """The guided Gaussian mixture in 16 dimensions, in closed form."""

    def __init__(self, guidance: float, pairs: int, fresh: int, fine: int) -> None:
        self.toy = GuidedMixture(guidance)
        self.base = diffusers.UniPCMultistepScheduler(**SD)
        self.levels = NoiseLevels.from_scheduler(self.base)
        self.pairs = {seed: self.toy.pairs(n, seed) for seed, n in ((1, pairs), (2, fresh), (3, 3 * pairs))}
        super().__init__(*(self._problem(seed, fine) for seed in (1, 3, 2)))

    def _problem(self, seed: int, fine: int) -> ModelProblem:
        x, prompts = self.pairs[seed]

        def epsilon(x: Tensor, timestep: float) -> Tensor:
            level = self.levels.level(float(self.levels.sigma_of_time(timestep)))
            return (x - level.alpha * self.toy.x0(x, level.alpha, level.sigma, prompts)) / level.sigma

        return ModelProblem(epsilon, x, self.levels, NODES, fine)

    def sample(self, cls: Any, config: dict[str, Any], steps: int) -> Any:
        scheduler = cls(**{**SD, **config})
        scheduler.set_timesteps(steps)
        x = self.pairs[2][0]
        for t in scheduler.timesteps:
            x = scheduler.step(self.fresh.epsilon(x, float(t)), t, x).prev_sample
        return x.double().numpy()


class PipelineBench(Bench):
    """A pipeline: prompts of the search splits to fit and choose, test prompts to judge."""

    def __init__(self, model: str, guidance: float, pairs: int, fresh: int, fine: int) -> None:
        self.pipe = load(model)
        self.pipe.set_progress_bar_config(disable=True)
        sets = (("search", pairs, 0), ("search", pairs, 10_000), ("test", fresh, 20_000))
        problems = []
        for split, n, seed in sets:
            prompts = sample_prompts(n, seed=seed, split=split)
            trials = Trials(self.pipe, prompts, list(range(seed, seed + n)), 4, guidance)
            problems.append(PipelineProblem(trials, NODES, fine))
        super().__init__(*problems)

    def sample(self, cls: Any, config: dict[str, Any], steps: int) -> Any:
        trials = self.fresh.trials
        trials.steps = steps
        final = trials.final(cls.from_config(self.pipe.scheduler.config, **config))
        return final.reshape(len(final), -1).numpy()


def compare(bench: Bench, steps: int, rungs: Sequence[str], say: Any) -> tuple[list[dict[str, Any]], Climb]:
    """A row for each solver: errors on the fresh pairs, and what the searched ones cost."""
    rows = [{"solver": name, **bench.stock(name, steps).told()} for name in STOCK]
    found = climb(bench.train, bench.held_out, steps, NODES, climbed=rungs, on_stage=say)
    for result in found.rungs:
        figures = errors(bench.fresh, result.schedule).told()
        cost = {"evaluations": result.evaluations, "seconds": result.seconds, "accepted": result.accepted}
        rows.append({"solver": f"searched: {result.name}", **figures, **cost})
    rows.append({"solver": "searched: what is given", **errors(bench.fresh, found.schedule).told()})
    return rows, found


def table(steps: int, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, with the ratio to the best stock solver of Diffusers."""
    best = min(row["mean"] for row in rows if not row["solver"].startswith("searched"))
    lines = [
        f"| {steps} evaluations | mean | 95 % | of the best stock | search: evaluations | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = f"{row['evaluations']} | {row['seconds']:.0f}" if "seconds" in row else " | "
        ratio = row["mean"] / best
        lines.append(f"| {row['solver']} | {row['mean']:.5f} | {row['p95']:.5f} | {ratio:.3f} | {cost} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches and measures, prints tables, writes JSON and the schedules found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--model", default="mixture", help="mixture, shapes, or the folder of such a pipeline"
    )
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 6, 8, 10])
    parser.add_argument("--pairs", type=int, default=64, help="to fit to")
    parser.add_argument("--fresh", type=int, default=400, help="to judge by at the end")
    parser.add_argument("--truth", type=int, default=1000, help="evaluations of the converged result")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/solvers_MODEL_GUIDANCE.json")
    parser.add_argument("--schedules", type=Path, help="folder for the schedules found")
    given = parser.parse_args(arguments)
    name = f"solvers_{Path(given.model).name}_{given.guidance:g}.json"
    path = given.json or RESULTS / name
    output_folder(path.parent)
    torch.set_grad_enabled(False)
    settings = (given.guidance, given.pairs, given.fresh, given.truth)
    bench = MixtureBench(*settings) if given.model == "mixture" else PipelineBench(given.model, *settings)
    results = {}
    with Progress(transient=True) as bars:
        task = bars.add_task("", total=len(given.steps))
        for steps in given.steps:

            def say(stage: str, steps: int = steps) -> None:
                bars.update(task, description=f"{steps} evaluations: {stage}")

            rows, found = compare(bench, steps, given.rungs, say)
            results[str(steps)] = rows
            if given.schedules:
                found.schedule.save(output_folder(given.schedules) / f"{steps}.json")
            bars.console.print(table(steps, rows) + "\n", markup=False)
            bars.advance(task)
    write_json(path, {"setting": {**vars(given), "json": None, "schedules": None}, "results": results})


if __name__ == "__main__":
    main()
