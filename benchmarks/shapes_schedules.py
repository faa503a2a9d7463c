"""Searches the solvers that ship with the Shapes model, and fits the polynomial: run again for new weights.

    python -m benchmarks.shapes_schedules

For every number of steps: the best solver that all rungs find at guidance 5 (`solver-*.json`), and the ratios
of DC-Solver on the method's own recipe at several guidance scales (`ratios-*.json`); `polynomial.json` is
fitted to the latter. Prompts are those of the search split only; half of the pairs judge. What is not better
than the stock solver is not shipped. Prints held-out errors and writes them as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import Progress

from diffplug import load
from diffplug.files import output_folder, write_json
from diffplug.samplers.nodes import Nodes
from diffplug.samplers.origin import architecture, fingerprint
from diffplug.samplers.polynomial import CompensationPolynomial
from diffplug.samplers.presets import unipc
from diffplug.samplers.schedule import SolverSchedule
from diffplug.samplers.search.climb import RUNGS
from diffplug.samplers.search.compensation import search_compensation
from diffplug.samplers.search.problem import PipelineProblem, errors
from diffplug.samplers.search.rungs import ratios, with_ratios
from diffplug.samplers.search.trials import Trials
from diffplug.samplers.shipped import shipped_folder
from diffplug.shapes import sample_prompts

RESULTS = Path(__file__).parent / "results"
NODES = Nodes(kind="name", name="linspace", final="sigma_min")
Say = Callable[[str], None]


@dataclass
class Workshop:
    """The pipeline, its pairs and the folder for what is found; `told` holds the figures."""

    pipe: Any
    pairs: int
    truth: int
    folder: Path
    cache: Path | None

    def __post_init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.origin = {"model": fingerprint(self.pipe), "architecture": architecture(self.pipe)}
        self.prompts = sample_prompts(self.pairs, seed=0, split="search")

    def problems(self, guidance: float) -> tuple[PipelineProblem, PipelineProblem]:
        """Pairs to fit to and to judge by, which share what the network said."""
        half = self.pairs // 2
        parts = [(self.prompts[:half], range(half)), (self.prompts[half:], range(half, self.pairs))]
        trials = [Trials(self.pipe, prompts, list(seeds), 4, guidance) for prompts, seeds in parts]
        trials[1].memo = trials[0].memo
        train, judge = (PipelineProblem(each, NODES, self.truth, self.cache) for each in trials)
        return train, judge

    def ratios(self, steps: int, guidance: float, say: Say) -> SolverSchedule:
        """DC-Solver's ratios on the method's recipe, saved with its errors; neutral where that is better."""
        say(f"ratios, {steps} steps, guidance {guidance:g}")
        train, judge = self.problems(guidance)
        plain, began = unipc(steps, NODES, disable_corrector=(0,)), perf_counter()
        with train.trials.remembering() as run:
            judge.trials.memo = run.memo
            seen = [plain]
            ratios(train, plain, watch=seen.append)
            best = min(seen, key=lambda each: errors(judge, each).mean)
            figures = {"baseline": errors(judge, plain).told(), "held out": errors(judge, best).told()}
            cost = {"evaluations": run.memo.evaluated, "seconds": round(perf_counter() - began, 1)}
        meta = {
            **self.origin,
            "steps": steps,
            "guidance_scale": guidance,
            "rung": "ratios",
            **figures,
            **cost,
        }
        found = replace(best, meta={**meta, "truth_steps": self.truth, "pairs": self.pairs})
        found.save(self.folder / f"ratios-{steps}-{guidance:g}.json")
        self.told.append({"kind": "ratios", **{k: v for k, v in meta.items() if k not in self.origin}})
        return found

    def polynomial(self, searched: dict[tuple[int, float], Sequence[float]], say: Say) -> None:
        """The polynomial through the ratios, saved; tells its own held-out errors too."""
        say("polynomial")
        fitted = CompensationPolynomial.fit(searched)
        replace(fitted, meta=self.origin).save(self.folder / "polynomial.json")
        for guidance in sorted({scale for _, scale in searched}):
            judge = self.problems(guidance)[1]
            for steps in sorted({count for count, _ in searched}):
                plain = unipc(steps, NODES, disable_corrector=(0,))
                curve = with_ratios(plain, dict(enumerate(fitted.ratios(steps, guidance))))
                told = {"steps": steps, "guidance_scale": guidance, "held out": errors(judge, curve).told()}
                self.told.append({"kind": "polynomial", **told, "baseline": errors(judge, plain).told()})

    def solver(self, steps: int, guidance: float, rungs: Sequence[str], say: Say) -> None:
        """The best solver of all rungs, saved where it beats the stock solvers."""
        found = search_compensation(
            self.pipe, self.prompts, steps, guidance, rungs=rungs, truth_steps=self.truth,
            cache=self.cache, on_stage=lambda stage: say(f"{steps} steps: {stage}"),
        )  # fmt: skip
        if found.improved:
            found.schedule.save(self.folder / f"solver-{steps}.json")
        names = ("steps", "guidance_scale", "rung", "baseline", "held out", "evaluations", "seconds")
        self.told.append({"kind": "solver", **{name: found.schedule.meta[name] for name in names}})


def table(told: Sequence[dict[str, Any]]) -> str:
    """Markdown: held-out errors before and after."""
    lines = [
        "| what | steps | guidance | stock | searched | ratio | evaluations | seconds |",
        f"|{'---|' * 8}",
    ]
    for row in told:
        before, after = row["baseline"]["mean"], row["held out"]["mean"]
        cells = [
            row["kind"],
            str(row["steps"]),
            f"{row['guidance_scale']:g}",
            f"{before:.2e}",
            f"{after:.2e}",
        ]
        cells += [f"{after / before:.2f}", str(row.get("evaluations", "")), f"{row.get('seconds', 0):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches, writes the files and prints the table."""
    told = _parser().parse_args(arguments)
    torch.set_grad_enabled(False)
    pipe = load(told.model).to(told.device)
    pipe.set_progress_bar_config(disable=True)
    folder = output_folder(told.out)
    for old in [
        *folder.glob("ratios-*.json"),
        *folder.glob("solver-*.json"),
        *folder.glob("polynomial.json"),
    ]:
        old.unlink()  # of other weights
    work = Workshop(pipe, told.pairs, told.truth, folder, told.cache)
    with Progress(transient=True) as bars:
        task = bars.add_task("", total=len(told.steps) * (1 + len(told.guidances)) + 1)

        def say(stage: str) -> None:
            bars.update(task, description=stage)

        searched: dict[tuple[int, float], Sequence[float]] = {}
        for guidance in told.guidances:
            for steps in told.steps:
                searched[steps, guidance] = work.ratios(steps, guidance, say).ratios
                bars.advance(task)
        work.polynomial(searched, say)
        bars.advance(task)
        for steps in told.steps:
            work.solver(steps, told.guidance, told.rungs, say)
            bars.advance(task)
    print(table(work.told))
    output_folder(told.json.parent)
    write_json(told.json, {"setting": {"pairs": told.pairs, "truth": told.truth}, "results": work.told})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes_schedules", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--model", default="shapes", help="shapes, or the folder of such a pipeline")
    add("--steps", type=int, nargs="+", default=[5, 6, 8, 10])
    add("--guidance", type=float, default=5.0, help="of the solvers")
    add(
        "--guidances", type=float, nargs="+", default=[3.0, 5.0, 7.5], help="of the ratios and the polynomial"
    )
    add("--pairs", type=int, default=128, help="of prompt and noise: half to fit to, half to judge by")
    add("--truth", type=int, default=200, help="evaluations of the converged result")
    add("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS)
    add("--device", default="cpu")
    add("--out", type=Path, default=shipped_folder("shapes"))
    add("--cache", type=Path, help="folder for converged latents and unfinished searches")
    add("--json", type=Path, default=RESULTS / "shapes_schedules.json")
    return parser


if __name__ == "__main__":
    main()
