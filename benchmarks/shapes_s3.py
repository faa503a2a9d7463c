"""Searches whole schedules for the Shapes model and ships what is better: run again for new weights.

    python -m benchmarks.shapes_schedules     first: the solvers that the rungs find
    python -m benchmarks.shapes_s3            then: schedules for 4, 5, 6, 8 and 10 evaluations

Prompts to search on and to choose by are those of the search split, the judging ones those of the test split.
A schedule takes the place of `solver-N.json` where its error on the pairs that choose is smaller; summaries
of all studies are shipped as `studies.json`. Unfinished studies are kept in --studies and gone on with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.search import shapes
from diffplug.files import output_folder, write_json
from diffplug.samplers.origin import architecture, fingerprint
from diffplug.samplers.schedule import SolverSchedule
from diffplug.samplers.search.front import longer
from diffplug.samplers.search.problem import errors
from diffplug.samplers.search.schedules import ScheduleSearch, search_space
from diffplug.samplers.shipped import shipped_folder

RESULTS = Path(__file__).parent / "results"


def summary(search: ScheduleSearch, figures: dict[str, Any]) -> dict[str, Any]:
    """What a study came to, JSON: a twentieth of its history, its finalists, its figures."""
    return {
        "evaluations": search.schedule.nfe,
        "metric": search.metric,
        "schedules": search.trials,
        "spent": round(search.spent, 2),
        "history": [(round(spent, 2), best) for spent, best in search.history[::20]],
        "finalists": search.finalists,
        "baseline": {"solver": search.baseline[0], "validation": search.baseline[1]},
        "validation": search.validation,
        **figures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches, ships the better schedules, writes JSON after every search."""
    given = _parser().parse_args(arguments)
    torch.set_grad_enabled(False)
    folder, studies = output_folder(given.out), output_folder(given.studies)
    found: list[dict[str, Any]] = []
    previous: SolverSchedule | None = None
    with Progress(transient=True) as bars:
        task = bars.add_task("", total=len(given.steps))
        for steps in sorted(given.steps):
            bench = shapes(given.model, steps, given.guidance, given.pairs, given.fresh)
            path = folder / f"solver-{steps}.json"
            old = SolverSchedule.load(path) if path.exists() else None

            def say(spent: float, best: float, steps: int = steps) -> None:
                bars.update(task, description=f"{steps} evaluations: {spent:.0f} schedules, {best:.4g}")

            seeds = [longer(previous, steps)] if previous is not None else []
            pipe = bench.train.trials.pipe  # type: ignore[attr-defined]
            told = {"model": fingerprint(pipe), "guidance_scale": given.guidance}
            with bench.train.trials.remembering():  # type: ignore[attr-defined]
                search = search_space(
                    bench.train, bench.validation, bench.space, trials=given.trials,
                    refinement=given.refinement, seeds=seeds, told=told, on_trial=say,
                    storage=studies / f"s3-{told['model'][:8]}.log",
                )  # fmt: skip
                previous = search.schedule
                rival = float("inf") if old is None else errors(bench.validation, old).mean
                name, preset = bench.best_preset()
                figures = {"test": bench.figures(previous), "best preset": {"solver": name}}
                figures["best preset"] |= {"test": bench.figures(preset)}
            row = summary(search, figures)
            row["shipped"] = search.improved and search.validation["mean"] < rival
            found.append(row)
            if row["shipped"]:
                meta = {**told, "architecture": architecture(pipe), "steps": steps, "method": "s3"}
                figures = {name: row[name] for name in ("baseline", "validation", "test", "metric", "spent")}
                SolverSchedule.from_json({**previous.to_json(), "meta": {**meta, **figures}}).save(path)
            told = {**vars(given), "out": None, "studies": None, "json": None}
            for place in (folder / "studies.json", given.json):
                output_folder(place.parent)
                write_json(place, {"setting": told, "results": found})
            bars.advance(task)
    print(table(found))


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
    add("--out", type=Path, default=shipped_folder("shapes"))
    add("--studies", type=Path, default=Path("runs") / "studies", help="folder for unfinished studies")
    add("--json", type=Path, default=RESULTS / "shapes_s3.json")
    return parser


if __name__ == "__main__":
    main()
