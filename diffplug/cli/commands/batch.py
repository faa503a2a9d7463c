"""`diffplug batch`: thousands of pictures from a manifest; this file only parses and prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffplug.cli import options as o
from diffplug.cli.boundary import BAD_INPUT
from diffplug.cli.console import guarded, print_json, until_stopped
from diffplug.cli.named_samplers import Samplers, name_samplers

if TYPE_CHECKING:
    from diffplug.demos.batch.job import Job
    from diffplug.demos.batch.pace import Pace
    from diffplug.demos.batch.plan import Plan

STOPPED = 3
"""Exit status where the environment does not let a batch go on."""


@guarded
def batch(
    context: typer.Context,
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help=".jsonl, .csv, .parquet, or a text, a prompt a line.")
    ],
    model: o.Model = "shapes",
    sampler: o.Sampler = None,
    samplers: Samplers = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; 20 if unsaid.")] = None,
    guidance: o.Guidance = None,
    negative_prompt: o.Negative = None,
    eta: o.Eta = None,
    width: o.Width = None,
    height: o.Height = None,
    seed: Annotated[int, typer.Option(min=0, help="Enters the seeds of rows that name none.")] = 0,
    steer: o.Steer = None,
    particles: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Particles for each picture.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="What steering asks for; see `diffplug names`.")] = None,
    strength: o.Strength = None,
    option: o.Option = None,
    out: o.Out = Path("out"),
    layout: Annotated[
        str, typer.Option(help="folder, tar (as webdataset reads it), geneval (a folder a prompt).")
    ] = "folder",
    shard: Annotated[int, typer.Option(min=1, max=100_000, help="Pictures of a shard, in the mean.")] = 256,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, max=4096, help="Pictures times particles in one call.")
    ] = 32,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes here, each with the model, a device each.")
    ] = 1,
    rank: Annotated[
        int, typer.Option(min=0, envvar="RANK", help="Which of the world's starters this is.")
    ] = 0,
    world: Annotated[
        int, typer.Option(min=1, envvar="WORLD_SIZE", help="How many starters share the folder.")
    ] = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="local; or ray: actors of a Ray cluster, whose own ports listen on every interface."
        ),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that runs; none starts one on this machine.")
    ] = None,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the first 64 rows that may fail.")
    ] = 0.05,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Do not try again what failed in an earlier run.")
    ] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Leave the settings out of the PNG files.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the manifest, tell what is to be done, make nothing.")
    ] = False,
    offload: o.Offload = "none",
    vae_tiling: o.VaeTiling = False,
    vae_slicing: o.VaeSlicing = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    json: o.Json = False,
) -> None:
    """Make every picture that a manifest asks for, each once, however often this is stopped and started.

    A line is an object with a prompt, and perhaps negative_prompt, seed, images, sampler, steps, guidance,
    eta, steer, particles, reward, strength, options, call, width, height and meta; or just a prompt. Options
    are for lines that say nothing. The same command again goes on; on several machines with one file system,
    start it on each.

    Exit status: 0 all pictures are there; 1 some rows failed; 2 bad input, or another job's folder; 3 the
    environment does not let it go on.

    Example: `diffplug batch prompts.jsonl --sampler dc-solver --steps 6 -o pictures`
    """
    from diffplug.demos.batch.job import Job
    from diffplug.demos.batch.model import Model
    from diffplug.placing import Memory

    values = context.params
    Memory(offload)  # refuses unknown words
    if engine not in ("local", "ray"):
        raise ValueError(f"engine {engine!r} is not known: take local or ray")
    if address is not None and engine != "ray":
        raise ValueError(f"--address {address!r} is of a Ray cluster: add --engine ray, or leave it out")
    if rank >= world:
        raise ValueError(f"--rank {rank} of --world {world}: ranks count from 0 to {world - 1}")
    used = Model(model, device, dtype, offload, vae_tiling, vae_slicing)
    called = name_samplers(samplers)
    job = Job(
        out, used.identity(), layout, shard, max_rows, not no_metadata, max_failures, keep_failed, called
    )
    job.check()
    plan = _plan(manifest, job, _settings(values), seed)
    if dry_run:
        return _tell_plan(job, plan, json=json)
    from diffplug.demos.batch.render import RefusedRecipes

    try:
        status = _run(job, used, plan, silent=json, as_json=json, how=values)
    except RefusedRecipes as error:
        job.leave()
        lines = [f"{manifest}:{plan.line_of(recipe)}: {text}" for recipe, text in error.problems]
        raise _refused(lines[:20], len(lines[20:])) from None
    raise typer.Exit(status)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return what options say for rows that say nothing."""
    from diffplug.cli.asked import split_options

    names = ("sampler", "steps", "guidance", "negative_prompt", "eta", "width", "height")
    found = {name: values[name] for name in (*names, "steer", "particles", "reward", "strength")}
    options, call = split_options(values["steer"], values["option"] or [])
    return {**found, "options": options or None, "call": call or None}


def _plan(manifest: Path, job: Job, settings: dict[str, Any], seed: int) -> Plan:
    """Return the plan; tell what is wrong with the manifest line by line."""
    from diffplug.demos.batch.manifest import ManifestError, read_manifest
    from diffplug.demos.batch.plan import plan

    try:
        found = plan(
            manifest, read_manifest(manifest), model=job.model, settings=settings, seed=seed, shard=job.shard
        )
    except ManifestError as error:
        raise _refused(error.problems, error.more) from None
    if found.first_double is not None:
        place, before = found.first_double
        typer.secho(
            f"warning: {found.doubles} of {found.asked} pictures are asked for twice, as on line {place} and "
            f"line {before}: each is made once. Give other seeds for more of them.",
            fg="yellow",
            err=True,
        )
    return found


def _refused(problems: list[str], more: int = 0) -> typer.Exit:
    """Print what is wrong with a manifest, a line each, and return the end of the command."""
    for line in problems:
        typer.secho(f"error: {' '.join(line.split())}", fg="red", err=True)
    if more:
        typer.secho(f"error: and {more} more", fg="red", err=True)
    return typer.Exit(BAD_INPUT)


def _tell_plan(job: Job, plan: Plan, *, json: bool) -> None:
    from diffplug.demos.batch.drivers import unfinished

    todo, missing, there = unfinished(job, plan.shards) if job.folder.is_dir() else (plan.shards, None, 0)
    facts = {
        "pictures": len(plan.pictures),
        "double_rows": plan.doubles,
        "recipes": len(plan.recipes),
        "shards": len(plan.shards),
        "there": there,
        "to_make": len(plan.pictures) - there if missing is None else missing,
        "shards_to_make": len(todo),
    }
    if json:
        return print_json(facts)
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):>15}  {value:,}")
    return None


def _run(job: Job, model: Any, plan: Plan, *, silent: bool, as_json: bool, how: dict[str, Any]) -> int:
    """Make what is missing, write the reports, and return the exit status."""
    from diffplug.demos.batch import drivers
    from diffplug.demos.batch.pace import Pace
    from diffplug.demos.batch.report import write_reports

    job.start()
    todo, missing, before = drivers.unfinished(job, plan.shards)
    pace, start, outcomes, stopped = Pace(missing), perf_counter(), [], None
    try:
        with (
            until_stopped(lambda: f"{pace.line()}; the same command goes on with the rest"),
            _shown(pace, silent),
        ):
            if how["engine"] == "ray":
                from diffplug.demos.batch.ray_driver import run as run_on_ray

                outcomes = run_on_ray(
                    job, model, todo, plan.recipes, address=how["address"], workers=how["workers"], tell=pace
                )
            elif todo:
                many = {name: how[name] for name in ("workers", "rank", "world")}
                outcomes = drivers.run(job, model, todo, plan.recipes, **many, tell=pace)
    except drivers.Stopped as error:
        stopped = str(error)
    if how["rank"] > 0 and stopped is None:
        return 0
    try:
        report = write_reports(job, plan, outcomes, perf_counter() - start, before)
    except OSError as error:  # the disk that stopped the pictures has no room for reports either
        report, stopped = None, stopped or str(error)
    if stopped is not None:
        typer.secho(f"error: stopped: {' '.join(stopped.split())[:600]}", fg="red", err=True)
    if report is not None:
        print_json(report) if as_json else _tell(job, report)
    if stopped is not None or report is None:
        return STOPPED
    return int(report["failed"] > 0 or report["there"] < report["pictures"])


@contextmanager
def _shown(pace: Pace, silent: bool) -> Iterator[None]:
    """Show the pace on the error stream: a bar on a terminal, else a line a minute."""
    import threading

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console, over = Console(stderr=True), threading.Event()
    bars = Progress(BarColumn(), TextColumn("{task.description}", markup=False), console=console)
    live = console.is_terminal and not silent

    def show() -> None:
        task = bars.add_task("", total=max(1, pace.total)) if live else None
        while not over.wait(0.25 if live else 60.0):
            if task is not None:
                bars.update(task, completed=pace.done, description=f"{pace.line()}  {pace.steps}")
            elif not silent:
                typer.echo(pace.line(), err=True)

    thread = threading.Thread(target=show, daemon=True)
    if live:
        bars.start()
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if live:
            bars.stop()


def _tell(job: Job, report: dict[str, Any]) -> None:
    """Print what came of it."""
    speed = report["pictures_per_second"]
    typer.echo(
        f"{report['there']:,} of {report['pictures']:,} pictures are in {job.folder}: "
        f"{report['made']:,} made now" + (f", {speed:.2f} a second" if report["made"] and speed else "")
    )
    if report["failed"]:
        one = report["failures"][0]
        typer.echo(
            f"{report['failed']:,} failed, the same command tries them again. Line {one['line']}: "
            f"{one['error']}: {one['message']}"
        )
    if report["orphans"]:
        typer.echo(f"{report['orphans']:,} pictures there are not in the manifest (any more): left alone")
    typer.echo(f"{job.folder / 'report.json'}, {job.folder / 'contact_sheet.html'}")
