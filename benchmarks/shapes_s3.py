"""Searches whole schedules for the Shapes model and ships what is better: run again for new weights.

    python -m benchmarks.shapes_schedules     first: the solvers that the fits find
    python -m benchmarks.shapes_s3            then: schedules for 4, 5, 6, 8 and 10 evaluations

Prompts to search on and to choose by are those of the search split, the judging ones those of the test split.
Searches begin with presets, with the schedule found for one length less and with what is shipped already. A
schedule takes the place of `solver-N.json` where a paired test, on pairs of the search split that nothing
else was done with, finds that one worse; summaries of all studies are shipped as `studies.json`. Unfinished
studies are kept in --studies and gone on with.

Pairs that end in another picture than the converged one, whatever the solver does, are most of a mean error,
and what lowers it is to blur: so the mean logarithm of the errors is what counts here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.command import opened
from benchmarks.compact import thinned, written
from benchmarks.search import Bench, on_pairs, prompts, search_space, shapes
from diffplug.files import output_folder
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.library import shipped_folder
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.comparison import PairedComparison, p_value
from diffplug.samplers.search.decisions.starts import longer
from diffplug.samplers.search.leader import Callbacks
from diffplug.samplers.search.metric import AGGREGATES, Metric
from diffplug.samplers.search.picture_metrics import parse_metric
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.search.result import SearchResult

RESULTS = Path(__file__).parent / "results"
PLACES = ("out", "studies", "json")
LEVEL = 0.05  # of the test that a schedule has to pass to take another one's place


def summary(search: SearchResult, figures: dict[str, Any]) -> dict[str, Any]:
    """What a study came to, JSON: some points of its history, its finalists, its figures."""
    return {
        "evaluations": search.schedule.nfe,
        "metric": search.metric,
        "schedules": len(search.study.trials),
        "spent": round(search.spent, 2),
        "history": thinned(search.history),
        "finalists": search.finalists,
        "baseline": {"solver": search.baseline, "validation": search.presets[search.baseline]},
        "validation": search.validation,
        **figures,
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches, ships the better schedules, writes JSON after every search."""
    given = _parser().parse_args(arguments)
    output_folder(given.out)
    pipe = opened(given.model, given.device)
    setting = {name: value for name, value in vars(given).items() if name not in PLACES}
    rows: list[dict[str, Any]] = []
    previous: SolverSchedule | None = None
    with Progress(transient=True) as bars:
        task = bars.add_task("", total=len(given.steps))

        def say(spent: float, best: float) -> None:
            done = f"{sorted(given.steps)[len(rows)]} evaluations: {spent:.0f} schedules, {best:.4g}"
            bars.update(task, description=done)

        for steps in sorted(given.steps):
            row, previous = searched(pipe, steps, given, previous, say)
            rows.append(row)
            for place in (given.out / "studies.json", given.json):
                output_folder(place.parent)
                written(place, {"setting": setting, "results": rows})
            bars.advance(task)
    print(table(rows))


def searched(
    pipe: Any,
    steps: int,
    given: argparse.Namespace,
    previous: SolverSchedule | None,
    say: Callable[[float, float], None],
) -> tuple[dict[str, Any], SolverSchedule]:
    """(the row of a number of evaluations, its schedule), which is shipped if it is the best there is."""
    bench, metric = shapes(pipe, steps, given.guidance, given.pairs, given.fresh), parse_metric(given.metric)
    told = {"model": fingerprint(pipe), "guidance_scale": given.guidance}
    storage = output_folder(given.studies) / f"s3-{told['model'][:8]}.log"
    path = given.out / f"solver-{steps}.json"
    old = SolverSchedule.load(path) if path.exists() else None
    seeds = [] if previous is None else [longer(previous, steps)]
    seeds += [] if old is None else [old]
    with bench.train.rollouts.remembering():  # type: ignore[attr-defined]
        search = search_space(
            bench, trials=given.trials, refinement=given.refinement, metric=metric, seeds=seeds,
            metadata=told, storage=storage, study_name=f"{steps} evaluations",
            callbacks=Callbacks(on_trial=say),
        )  # fmt: skip
        found = search.schedule
        name, preset = bench.best_preset()
        best = {"solver": name, "test": bench.figures(preset)}
        row = summary(search, {"test": bench.figures(found), "best preset": best})
    again = old is not None and replace(old, meta={}) == replace(found, meta={})
    better = old is None or surely_worse(referee(pipe, bench, given), metric, old, found)
    row["shipped"] = again or (search.improved and better)
    if row["shipped"]:
        meta = {**told, "architecture": architecture(pipe), "steps": steps, "method": "s3"}
        figures = {name: row[name] for name in ("baseline", "validation", "test", "metric", "spent")}
        replace(found, meta={**meta, **figures}).save(path)
    return row, found


def referee(pipe: Any, bench: Bench, given: argparse.Namespace) -> PipelineProblem:
    """Pairs that nothing was searched on or chosen by: the best of many looks good on those that chose it."""
    seen = {*bench.train.prompts, *bench.validation.prompts}
    words = [prompt for prompt in prompts(8 * given.pairs, "search") if prompt not in seen]
    return on_pairs(pipe, words[: 2 * given.pairs], 30_000, bench.space.evaluations, given.guidance)


def surely_worse(problem: Problem, metric: Metric, one: SolverSchedule, other: SolverSchedule) -> bool:
    """Whether a paired test finds `one` worse; metrics of whole sets of pictures are only compared."""
    judge = PairedComparison(problem, metric, prune=False)
    first, second = judge.score(one), judge.score(other)
    if not metric.paired:
        return first.value > second.value
    return p_value(first.marks, second.marks, AGGREGATES[metric.aggregate]) <= LEVEL  # type: ignore[attr-defined]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: test pairs, best preset against the schedule found."""
    lines = [
        "| evaluations | best preset | its error | found | ratio | strict | preset's strict | shipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        preset, ours = row["best preset"]["test"], row["test"]
        cells = [str(row["evaluations"]), row["best preset"]["solver"], f"{preset['mean']:.3e}"]
        cells += [f"{ours['mean']:.3e}", f"{ours['mean'] / preset['mean']:.2f}", f"{ours['strict']:.1%}"]
        cells += [f"{preset['strict']:.1%}", "yes" if row["shipped"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes_s3", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--model", default="shapes", help="shapes, or the folder of such a pipeline")
    add("--steps", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    add("--guidance", type=float, default=5.0)
    add("--pairs", type=int, default=48, help="to search on; twice as many choose")
    add("--fresh", type=int, default=300, help="test prompts that judge")
    add("--trials", type=int, default=200, help="schedules for each number of evaluations")
    add("--refinement", type=int, default=80, help="runs for least squares at the end")
    add("--metric", default="latent-mse:log", help="as for diffplug search --for")
    add("--device", default="cpu")
    add("--out", type=Path, default=shipped_folder("shapes"))
    add("--studies", type=Path, default=Path("runs") / "studies", help="folder for unfinished studies")
    add("--json", type=Path, default=RESULTS / "shapes_s3.json")
    return parser


if __name__ == "__main__":
    main()
