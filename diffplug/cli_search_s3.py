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

from diffplug.console import guarded, print_json, print_table
from diffplug.files import output_folder

INTERRUPTED = 130  # exit status, as shells have it


@guarded
def s3(
    steps: Annotated[
        str, typer.Option(help="Evaluations of the schedule to find; several with commas: 4,5,6,8.")
    ] = "5",
    model: Annotated[str, typer.Option(help="shapes (embedded), a folder, or a hub id.")] = "shapes",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line; the Shapes model has its own.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; else the model's own.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="latent-mse, latent-mse:median (or trimmed, p95, log), features:EXTRACTOR, fid:EXTRACTOR, "
            "kid:EXTRACTOR, reward:SPEC, FILE.py:FUNCTION."
        ),
    ] = "latent-mse",
    method: Annotated[str, typer.Option(help="s3, s3-lstm, evolution, tpe, nsga2, cmaes, random.")] = "s3",
    trials: Annotated[
        int, typer.Option(min=1, help="Schedules to run on all pairs, those of an earlier start included.")
    ] = 400,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop searching after so long.")] = None,
    refinement: Annotated[int, typer.Option(min=0, help="Runs for least squares at the end.")] = 100,
    pairs: Annotated[
        int, typer.Option(min=1, max=100_000, help="Pairs of prompt and noise to search on.")
    ] = 64,
    validation: Annotated[
        int | None, typer.Option(min=1, help="Pairs that choose; else twice as many.")
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Pairs that only judge; else as many.")] = None,
    grids: Annotated[
        str | None, typer.Option(help="Grids whose presets come first, eight on each; else six grids.")
    ] = None,
    prune: Annotated[bool, typer.Option(help="Give up early what is surely worse.")] = True,
    ceiling: Annotated[
        float, typer.Option(min=0, help="For rewards: latent error allowed, over the best preset's.")
    ] = 1.0,
    start: Annotated[
        list[Path] | None, typer.Option("--start", help="Schedule file to begin with as well; repeatable.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="Study file, to go on with and to share: .db, or .log on network disks."),
    ] = None,
    truth: Annotated[int, typer.Option(min=2, help="Evaluations of the converged result.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Prompts in one call of the pipeline.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search and of the first pair.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON file to write; -4, -5, ... are added for several.")
    ] = Path("schedule.json"),
    plots: Annotated[bool, typer.Option(help="Write two PNG pictures beside it.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Searches every decision of a solver: grid, prediction types, orders, correctors.

    Example: `diffplug search s3 --model shapes --steps 5 --guidance 5 --trials 200 -o five.json`, then
    `diffplug generate "a red circle" --sampler five.json --steps 5 --guidance 5`

    Interrupted, the same command goes on; several at once share the work.
    """
    from diffplug.cli import _pipe
    from diffplug.cli_search import _prompts

    counts = _counts(steps)
    output_folder(out.parent)
    search = import_module("diffplug.samplers.search.front").search_front
    options: dict[str, Any] = {
        "metric": _metric(metric, ceiling),
        "method": method,
        "trials": trials,
        "seconds": seconds,
        "refinement": refinement,
        "pairs": pairs,
        "validation": validation,
        "test": test,
        "prune": prune,
        "seeds": _schedules(start or []),
        "storage": study or out.with_suffix(".study.db"),
        "truth_steps": truth,
        "max_rows": rows,
        "seed": seed,
    }
    if grids:
        options["grids"] = [name.strip() for name in grids.split(",") if name.strip()]
    words = _prompts(prompts, model, 4 * pairs, seed)
    pipe = _pipe(model, device, dtype, words if model == "shapes" else [])
    pipe.set_progress_bar_config(disable=True)
    try:
        with _bar(trials, hidden=json) as (on_search, on_trial):
            found = search(pipe, words, counts, guidance, on_search=on_search, on_trial=on_trial, **options)
    except KeyboardInterrupt:
        typer.secho(f"stopped; what was run is in {options['storage']}: repeat the command", err=True)
        raise typer.Exit(INTERRUPTED) from None
    files = {n: out if len(counts) == 1 else out.with_stem(f"{out.stem}-{n}") for n in counts}
    for n, path in files.items():
        found.searches[n].schedule.save(path)
    pictures = _drawn(found, files, pipe) if plots else []
    _tell(found, files, pictures, json=json)


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
    levels = _levels_of(pipe)
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


@guarded
def from_usf(
    file: Annotated[Path, typer.Argument(help="A .pth file of thu-nics/USF.")],
    times: Annotated[
        str, typer.Option(help="What its timesteps mean: edm, vp (ScoreSDE), or model (--model's own).")
    ] = "model",
    model: Annotated[str, typer.Option(help="For --times model: shapes, a folder or a hub id.")] = "shapes",
    mean: Annotated[
        str | None, typer.Option(help="Mean of the data by channel, as 0.1,0.2,0.3, if it begins with it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")] = Path("schedule.json"),
) -> None:
    """Reads a published schedule of USF; the file's code is not run.

    Example: `diffplug search import stable_diffusion_nfe5.pth --model runwayml/... -o five.json`
    """
    load_usf = import_module("diffplug.samplers.published").load_usf
    output_folder(out.parent)
    schedule = load_usf(file, _levels(model) if times == "model" else times, mean=_floats(mean))
    schedule.save(out)
    needs = [i for i, step in enumerate(schedule.steps) if step.param == "ems"]
    typer.echo(f"{schedule.nfe} evaluations, {len(schedule.steps)} steps: {out}")
    if needs:
        typer.echo(
            f"steps {needs} need a model's empirical statistics (DPM-Solver-v3): this file will not run"
        )


@guarded
def to_list(
    file: Annotated[Path, typer.Argument(help="A schedule, JSON.")],
    model: Annotated[str, typer.Option(help="Whose noise levels: shapes, a folder or a hub id.")] = "shapes",
    kind: Annotated[
        str, typer.Option(help="sigmas (ComfyUI, k-diffusion) or timesteps (Diffusers).")
    ] = "sigmas",
) -> None:
    """Prints a schedule's grid as a plain list, for programs that take one; the rest of the solver is lost.

    Example: `diffplug search export five.json --kind sigmas`
    """
    published = import_module("diffplug.samplers.published")
    schedule = _schedules([file])[0]
    numbers = published.export_grid(schedule, _levels(model), kind)
    typer.echo(", ".join(f"{value:.7g}" for value in numbers))


def _levels(model: str) -> Any:
    """The noise levels of a model."""
    from diffplug.cli import _pipe

    return _levels_of(_pipe(model, "cpu", "auto", []))


def _levels_of(pipe: Any) -> Any:
    solver = import_module("diffplug.samplers.solver").SolverScheduler
    built = import_module("diffplug.scheduler_plug").build(solver, pipe)
    return import_module("diffplug.samplers.noise_levels").NoiseLevels.from_scheduler(built)


def _floats(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"mean {text!r}: give numbers with commas, one or one for each channel") from None
