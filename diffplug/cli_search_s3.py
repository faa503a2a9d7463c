"""`diffplug search s3`: whole solver schedules, for the measure that a person cares for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffplug.cli_few_step import FewStepName, with_few_step
from diffplug.cli_options import Device, Dtype, FirstSeed, Guidance, Json, Model, Prompts
from diffplug.cli_search_files import levels_of, pipe_and_prompts
from diffplug.console import guarded, print_json, print_table, until_stopped
from diffplug.files import output_file

MetricSpec = Annotated[
    str,
    typer.Option(
        "--metric",
        help="latent-mse, latent-mse:median (or trimmed, p95, log), features:EXTRACTOR, fid:EXTRACTOR, "
        "kid:EXTRACTOR, reward:SPEC, FILE.py:FUNCTION.",
    ),
]
Method = Annotated[str, typer.Option(help="s3, s3-lstm, evolution, tpe, nsga2, cmaes, random.")]
TrialCount = Annotated[
    int,
    typer.Option(
        "--trials", min=1, help="Schedules to run on all pairs, those of an earlier start included."
    ),
]
Seconds = Annotated[float | None, typer.Option(min=0, help="Stop searching after so long.")]
Refinement = Annotated[int, typer.Option(min=0, help="Runs for least squares at the end.")]
Pairs = Annotated[int, typer.Option(min=1, max=100_000, help="Pairs of prompt and noise to search on.")]
Validation = Annotated[int | None, typer.Option(min=1, help="Pairs that choose; else twice as many.")]
Test = Annotated[int | None, typer.Option(min=1, help="Pairs that only judge; else as many.")]
Grids = Annotated[
    str | None, typer.Option(help="Grids whose presets come first, eight on each; else six grids.")
]
Prune = Annotated[bool, typer.Option(help="Give up early what is surely worse.")]
Ceiling = Annotated[
    float, typer.Option(min=0, help="For rewards: latent error allowed, over the best preset's.")
]
Statistics = Annotated[
    bool,
    typer.Option(
        "--statistics",
        help="Measure the model's statistics first (120 evaluations), for steps that stand on them; the file "
        "beside the output belongs to the result.",
    ),
]
Start = Annotated[
    list[Path] | None, typer.Option("--start", help="Schedule file to begin with as well; repeatable.")
]
Study = Annotated[
    Path | None, typer.Option(help="Study file, to go on with and to share: .db, or .log on network disks.")
]
Truth = Annotated[int, typer.Option(min=2, help="Evaluations of the converged result.")]
Rows = Annotated[int, typer.Option(min=1, help="Prompts in one call of the pipeline.")]


@guarded
def s3(
    steps: Annotated[
        str, typer.Option(help="Evaluations of the schedule to find; several with commas: 4,5,6,8.")
    ] = "5",
    model: Model = "shapes",
    prompts: Prompts = None,
    guidance: Guidance = None,
    few_step: FewStepName = None,
    metric: MetricSpec = "latent-mse",
    method: Method = "s3",
    trials: TrialCount = 400,
    seconds: Seconds = None,
    refinement: Refinement = 100,
    pairs: Pairs = 64,
    validation: Validation = None,
    test: Test = None,
    grids: Grids = None,
    prune: Prune = True,
    ceiling: Ceiling = 1.0,
    statistics: Statistics = False,
    start: Start = None,
    study: Study = None,
    truth: Truth = 200,
    rows: Rows = 64,
    seed: FirstSeed = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON file to write; -4, -5, ... are added for several.")
    ] = Path("schedule.json"),
    plots: Annotated[bool, typer.Option(help="Write two PNG pictures beside it.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Searches every decision of a solver: grid, prediction types, orders, correctors.

    Example: `diffplug search s3 --model shapes --steps 5 --guidance 5 --trials 200 -o five.json`, then
    `diffplug generate "a red circle" --sampler five.json --steps 5 --guidance 5`

    Interrupted, the same command goes on; several at once share the work.
    """
    counts = _counts(steps)
    output_file(out)
    options: dict[str, Any] = {
        **{"method": method, "trials": trials, "seconds": seconds, "refinement": refinement, "pairs": pairs},
        **{"validation": validation, "test": test, "prune": prune, "seed": seed},
        "metric": _metric(metric, ceiling),
        "seeds": _schedules(start or []),
        "statistics": out.with_suffix(".statistics.safetensors") if statistics else None,
        "storage": study or out.with_suffix(".study.db"),
        "truth_steps": truth,
        "max_rows": rows,
    }
    if grids:
        options["grids"] = [name.strip() for name in grids.split(",") if name.strip()]
    pipe, words = pipe_and_prompts(model, device, dtype, prompts, 4 * pairs, seed)
    guidance = with_few_step(pipe, few_step, guidance)
    found = _search(pipe, words, counts, guidance, options, hidden=json)
    files = {n: out if len(counts) == 1 else out.with_stem(f"{out.stem}-{n}") for n in counts}
    for n, path in files.items():
        found.searches[n].schedule.save(path)
    pictures = _drawn(found, files, pipe) if plots else []
    _tell(found, files, pictures, json=json)


def _search(
    pipe: Any,
    words: list[str],
    counts: list[int],
    guidance: float | None,
    options: dict[str, Any],
    *,
    hidden: bool,
) -> Any:
    """The searches, with a bar; Ctrl-C says how to go on."""
    search = import_module("diffplug.samplers.search.front").search_front
    with (
        until_stopped(f"what was run is in {options['storage']}: repeat the command"),
        _bar(options["trials"], hidden=hidden) as (on_search, on_trial),
    ):
        return search(pipe, words, counts, guidance, on_search=on_search, on_trial=on_trial, **options)


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or not all(2 <= n <= 100 for n in counts):
        raise ValueError(f"steps {text!r}: give whole numbers from 2 to 100, such as 5 or 4,5,6,8")
    return counts


def _metric(spec: str, ceiling: float) -> Any:
    """The metric; rewards get their ceiling."""
    from dataclasses import replace

    metric = import_module("diffplug.samplers.search.metric").parse_metric(spec)
    return metric if metric.ceiling is None else replace(metric, ceiling=ceiling)


def _schedules(paths: list[Path]) -> list[Any]:
    load = import_module("diffplug.samplers.schedule").SolverSchedule.load
    return [load(path) for path in paths]


@contextmanager
def _bar(trials: int, *, hidden: bool) -> Iterator[tuple[Any, Any]]:
    """A bar on the error stream with the best value so far: (told whose turn it is, told what was spent)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bars:
        task, turn = bars.add_task("converged results", total=trials), [0]

        def on_search(steps: int) -> None:
            turn[0] = steps
            bars.update(task, completed=0, description=f"{steps} evaluations: converged results")

        def on_trial(spent: float, best: float) -> None:
            text = f"{turn[0]} evaluations: {spent:.0f} of {trials} schedules, best {best:.4g}"
            bars.update(task, completed=min(spent, trials), description=text)

        yield on_search, on_trial


def _drawn(found: Any, files: dict[int, Path], pipe: Any) -> list[Path]:
    """The pictures of every search."""
    plots = import_module("diffplug.samplers.search.plots")
    levels = levels_of(pipe)
    paths = []
    for n, path in files.items():
        history, drawn = path.with_suffix(".history.png"), path.with_suffix(".schedule.png")
        plots.plot_history(found.searches[n], history)
        plots.plot_schedule(found.searches[n].schedule, levels, drawn)
        paths += [history, drawn]
    return paths


def _tell(found: Any, files: dict[int, Path], pictures: list[Path], *, json: bool) -> None:
    rows = []
    for n, path in files.items():
        search = found.searches[n]
        name, baseline = search.baseline
        row = {"steps": n, "schedule": str(path), "metric": search.metric, "improved": search.improved}
        row |= {"baseline": {"solver": name, "validation": baseline, "test": search.baseline_test}}
        row |= {"validation": search.validation, "test": search.test, "spent": search.spent}
        rows.append({**row, "meta": dict(search.schedule.meta)})
    if json:
        told = {"rows": rows, "pareto": found.pareto, "pictures": [str(path) for path in pictures]}
        print_json(told)
        return
    best = {n for n, _ in found.pareto}
    cells = [
        [
            str(row["steps"]), row["baseline"]["solver"], f"{row['baseline']['test']['value']:.4g}",
            f"{row['test']['value']:.4g}", f"{row['test']['mean']:.4g}", f"{row['spent']:.0f}",
            "yes" if row["steps"] in best else "no", row["schedule"],
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["steps", "best preset", "its value", "found", "latent error", "schedules", "front", "file"]
    print_table(columns, cells, right=["steps", "its value", "found", "latent error", "schedules"])
    typer.echo(f"{rows[0]['metric']} on test pairs, which nothing was chosen by; lower is better.")
    for row in rows:
        if not row["improved"]:
            typer.echo(
                f"{row['steps']}: nothing beat {row['baseline']['solver']}, which is what the file holds."
            )
    for path in pictures:
        typer.echo(str(path))
