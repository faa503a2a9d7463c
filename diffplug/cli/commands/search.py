"""`diffplug search`: a few-step solver found for a person's own model, steps and guidance, kept in a file."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from diffplug.cli.commands.few_step import FewStepName, with_few_step
from diffplug.cli.console import guarded, print_json, print_table, until_stopped
from diffplug.cli.options import Device, Dtype, FirstSeed, Guidance, Json, Model, Prompts, schedule_file
from diffplug.cli.pipeline import pipe_and_prompts
from diffplug.files import output_file

OLD = {
    "dc": "leave the word out, and name stages by --stages ratios,grid,weights,states",
    "s3": "diffplug search --stages decisions",
    "tune": "diffplug search --stages gradient --for reward:SPEC --start FILE",
    **{"statistics": "diffplug schedule measure", "import": "diffplug schedule import"},
    "export": "diffplug schedule export",
}

Objective = Annotated[
    str,
    typer.Option(
        "--for",
        help="error (distance from the converged latents), robust, median, log, trimmed or p95 of it, "
        "features:EXTRACTOR, fid:EXTRACTOR, kid:EXTRACTOR, reward:SPEC, FILE.py:FUNCTION.",
    ),
]
Spending = Annotated[
    float, typer.Option("--budget", min=1, help="Schedules to run on all searched pairs; chooses the stages.")
]
Stages = Annotated[
    str | None,
    typer.Option(help="Any of decisions, ratios, grid, weights, states, gradient, instead of the budget's."),
]
Start = Annotated[
    list[str] | None,
    typer.Option("--start", help="Schedule to begin with as well: a file, or a preset@grid; repeatable."),
]
Pairs = Annotated[int, typer.Option(min=1, max=100_000, help="Pairs of prompt and noise to search on.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting: validation, test, tail, grid, grids, truth_steps, max_rows, trials, "
        "refinement, seconds, method, analytic, statistics, rate, batch, steps (of a gradient), ceiling.",
    ),
]
Place = Annotated[
    str | None,
    typer.Option(
        help="File of progress (.json, -4, -5, ... are added for several; with decisions .db or .log), or a "
        "database's URL."
    ),
]


@guarded
def search(
    old: Annotated[str | None, typer.Argument(hidden=True)] = None,
    steps: Annotated[
        str, typer.Option(help="Evaluations of the solver to find; several with commas: 4,5,6,8.")
    ] = "5",
    guidance: Guidance = None,
    model: Model = "shapes",
    few_step: FewStepName = None,
    prompts: Prompts = None,
    objective: Objective = "error",
    budget: Spending = 200,
    stages: Stages = None,
    start: Start = None,
    pairs: Pairs = 64,
    settings: Set = None,
    progress: Place = None,
    seed: FirstSeed = 0,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            parser=schedule_file,
            metavar="FILE",
            help="JSON file to write; -4, -5, ... are added for several.",
        ),
    ] = Path("schedule.json"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Find a few-step solver for your model, steps and guidance.

    Example: `diffplug search --model shapes --steps 5 --guidance 5 -o five.json`, then
    `diffplug generate "a red circle" --sampler five.json --steps 5 --guidance 5`

    Stages go from few numbers to many, and each is kept only where unseen pairs agree. Interrupted, the same
    command continues.
    """
    if old is not None:
        raise ValueError(f"`search {old}` is one command now: {OLD.get(old, 'leave the word out')}")
    from diffplug.samplers.search.front import search_front
    from diffplug.samplers.search.picture_metrics import parse_metric
    from diffplug.samplers.search.search import budgeted
    from diffplug.samplers.search.search import search as run
    from diffplug.samplers.search.settings import Settings, check_stages_act

    counts, given = _counts(steps), _given(settings or [])
    output_file(out)
    metric = parse_metric(objective, ceiling=float(given.pop("ceiling", 1.0)))
    names = None if stages is None else [name.strip() for name in stages.split(",") if name.strip()]
    chosen, shares = budgeted(budget, names)
    options = Settings.of(**{"pairs": pairs, "seed": seed, **shares, **given})
    check_stages_act(given, chosen)
    files = _files(out, counts)
    places = _places(progress, files, database="decisions" in chosen)
    known = _starts(start or [], counts)
    pipe, words = pipe_and_prompts(model, device, dtype, prompts, max(4 * pairs, 12), seed)
    guidance = with_few_step(pipe, few_step, guidance)
    seeds = [schedule(pipe) for schedule in known]

    with until_stopped("the same command continues after what is done"), _shown(json) as callbacks:

        def find(pipe: Any, words: Any, n: int, guidance: Any, *, seeds: Any) -> Any:
            return run(
                pipe, words, n, guidance, objective=metric, stages=chosen, start=seeds, settings=options,
                storage=places[n], callbacks=callbacks,
            )  # fmt: skip

        found = search_front(pipe, words, counts, guidance, find=find, seeds=seeds)
    for n, path in files.items():
        found.searches[n].schedule.save(path)
    for each in found.searches.values():
        each.forget()
    _tell(found, files, json=json)


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    counts = sorted({int(part) for part in parts if part.isdecimal()})
    if len(counts) < len(parts) or not all(2 <= n <= 100 for n in counts):
        raise ValueError(f"steps {text!r}: give whole numbers from 2 to 100, each once, such as 5 or 4,5,6,8")
    return counts


def _files(path: Path, counts: list[int]) -> dict[int, Path]:
    """Return a file for each number of steps: the one given, or its name with -4, -5, ... for several."""
    return {n: path if len(counts) == 1 else path.with_stem(f"{path.stem}-{n}") for n in counts}


def _places(progress: str | None, files: dict[int, Path], *, database: bool) -> dict[int, Any]:
    """Return where each search keeps how far it came; a database holds all of them, a JSON file holds one."""
    if progress is None:
        kind = "db" if database else "json"
        return {n: path.with_suffix(f".progress.{kind}") for n, path in files.items()}
    kind = Path(progress).suffix
    if database:
        from diffplug.samplers.search.decisions.study import JOURNALS, is_file  # with Optuna

        if is_file(progress) and kind not in (".db", *JOURNALS):
            raise ValueError(
                f"--progress {progress!r}: with the stage decisions give a .db or .log file, or a URL"
            )
        return dict.fromkeys(files, progress)
    if "://" in progress or kind != ".json":
        raise ValueError(f"--progress {progress!r}: without the stage decisions give a .json file")
    return dict(_files(Path(progress), list(files)))


def _given(words: list[str]) -> dict[str, Any]:
    """Return settings as Python values."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--set {wrong[0]!r}: write NAME=VALUE, such as --set validation=48")
    found: dict[str, Any] = {}
    for name, value in (word.split("=", 1) for word in words):
        if (name := name.strip()) in found:
            raise ValueError(f"--set {name} is there twice: give it once")
        if name in ("pairs", "seed"):
            raise ValueError(f"--set {name}={value}: it has an option of its own, --{name} {value.strip()}")
        found[name] = _value(value.strip())
    if isinstance(found.get("grids"), str):
        found["grids"] = [name.strip() for name in found["grids"].split(",")]
    return found


def _value(text: str) -> Any:
    with suppress(ValueError, SyntaxError):
        return literal_eval(text.title() if text.lower() in ("true", "false") else text)
    return text


def _starts(names: list[str], counts: list[int]) -> list[Any]:
    """Return functions of the pipeline that give the schedules to begin with."""
    from diffplug.samplers.schedule.presets import preset
    from diffplug.samplers.schedule.schedule import SolverSchedule
    from diffplug.samplers.search.pipeline_problem import ends_of

    found: list[Any] = []
    for name in names:
        if Path(name).suffix == ".json" or Path(name).exists():
            schedule = SolverSchedule.load(name)
            found.append(lambda pipe, schedule=schedule: schedule)
            continue
        head, _, grid = name.partition("@")
        make = preset(head)
        at = grid or "linspace"
        found += [lambda pipe, n=n, make=make, at=at: make(n, ends_of(pipe, at)) for n in counts]
    return found


@contextmanager
def _shown(hidden: bool) -> Iterator[Any]:
    """Show on the error stream what is going on; yields the callbacks."""
    from diffplug.samplers.search.leader import Callbacks

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bars:
        task, said, calls = bars.add_task("converged results"), ["presets"], count(1)

        def show() -> None:
            bars.update(task, description=f"{said[-1]}: {next(calls)} network calls")

        yield Callbacks(
            on_stage=said.append,
            on_trial=lambda spent, best: said.append(f"decisions, {spent:.0f} schedules, best {best:.4g}"),
            on_step=lambda done, now, best: said.append(f"step {done}: reward {now:.4g}, best {best:.4g}"),
            on_evaluation=show,
        )


def _tell(found: Any, files: dict[int, Path], *, json: bool) -> None:
    rows = [_row(n, found.searches[n], path) for n, path in files.items()]
    if json:
        print_json({"rows": rows, "pareto": found.pareto})
        return
    right = ["value", "latent error", "median", "95 %", "of the best preset", "amplification"]
    for n, path in files.items():
        search = found.searches[n]
        lines = [(name, f, None, "preset") for name, f in search.presets.items()]
        lines += [
            (s.name, s.validation, s.amplification, "kept" if s.accepted else "left") for s in search.stages
        ]
        best = search.presets[search.baseline]["mean"]
        cells = [
            [
                name, f"{f['value']:.4g}", *(f"{f[figure]:.5f}" for figure in ("mean", "median", "p95")),
                f"{f['mean'] / best:.2f}" if best else "", f"{gain:.2f}" if gain else "", verdict,
            ]
            for name, f, gain, verdict in lines
        ]  # fmt: skip
        print_table([f"{n} evaluations", *right, ""], cells, right=right)
        if not search.improved:
            typer.echo(f"Nothing beat {search.baseline}, which is what the file holds.")
        values = f"{search.baseline} {search.baseline_test['value']:.4g}, found {search.test['value']:.4g}"
        typer.echo(f"On pairs that only judge: {values} ({search.metric}; lower is better): {path}")
    if len(files) > 1:
        typer.echo("Worth their evaluations: " + ", ".join(str(n) for n, _ in found.pareto))


def _row(n: int, search: Any, path: Path) -> dict[str, Any]:
    left_out = ("schedule", "history")
    known = {"solver": search.baseline, "validation": search.presets[search.baseline]}
    return {
        **{"steps": n, "schedule": str(path), "metric": search.metric, "improved": search.improved},
        **{"baseline": {**known, "test": search.baseline_test}, "spent": search.spent},
        **{"validation": search.validation, "test": search.test, "meta": dict(search.schedule.meta)},
        "stages": [{k: v for k, v in vars(s).items() if k not in left_out} for s in search.stages],
    }
