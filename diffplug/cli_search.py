"""`diffplug search ...`: solvers found for a person's own model, steps and guidance, kept in a file."""

from __future__ import annotations

from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from diffplug import cli_search_files, cli_search_s3, cli_search_tune
from diffplug.cli_few_step import FewStepName, with_few_step
from diffplug.cli_options import Device, Dtype, FirstSeed, Guidance, Json, Model, Prompts, ScheduleOut
from diffplug.cli_search_files import pipe_and_prompts
from diffplug.console import guarded, print_json, print_table, until_stopped
from diffplug.files import output_file

app = typer.Typer(no_args_is_help=True, help="Find few-step solvers for your model, steps and guidance.")


app.command()(cli_search_s3.s3)
app.command()(cli_search_tune.tune)
app.command(name="statistics")(cli_search_files.statistics)
app.command(name="import")(cli_search_files.from_usf)
app.command(name="export")(cli_search_files.to_list)


@app.callback()
def main() -> None:
    """Find few-step solvers for your model, steps and guidance."""


@app.command()
@guarded
def dc(
    steps: Annotated[int, typer.Option(min=2, max=100, help="Evaluations of the solver to find.")] = 6,
    model: Model = "shapes",
    prompts: Prompts = None,
    pairs: Annotated[
        int, typer.Option(min=2, max=10_000, help="Pairs of prompt and noise: half to fit, half to judge.")
    ] = 64,
    guidance: Guidance = None,
    few_step: FewStepName = None,
    rungs: Annotated[
        str, typer.Option(help="Any of ratios, grid, coefficients, full; the first is DC-Solver.")
    ] = "ratios,grid,coefficients,full",
    grid: Annotated[str, typer.Option(help="Name of the grid to start from.")] = "linspace",
    loss: Annotated[
        str, typer.Option(help="squared; or robust: forgives pairs that end in another picture.")
    ] = "squared",
    seed: FirstSeed = 0,
    out: ScheduleOut = Path("schedule.json"),
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted search.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Climbs from DC-Solver's ratios to whole coefficient tables, as far as held-out pairs agree.

    Example: `diffplug search dc --model shapes --steps 6 --guidance 5 -o six.json`, then
    `diffplug generate "a red circle" --sampler six.json --steps 6 --guidance 5`
    """
    climbed = [name.strip() for name in rungs.split(",") if name.strip()]
    if not climbed:
        raise ValueError("--rungs names none: give any of ratios, grid, coefficients, full")
    output_file(out)
    pipe, words = pipe_and_prompts(model, device, dtype, prompts, pairs, seed)
    guidance = with_few_step(pipe, few_step, guidance)
    search = import_module("diffplug.samplers.search.compensation").search_compensation
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=json) as bars:
        task, stages, calls = bars.add_task("reading"), [""], count()

        def show(done: int) -> None:
            bars.update(task, description=f"{stages[-1]}: {done} network calls")

        with until_stopped("the same command goes on from the last finished rung"):
            found = search(
                pipe,
                words,
                steps,
                guidance,
                rungs=climbed,
                grid=grid,
                loss=loss,
                seed=seed,
                resume=resume,
                on_stage=stages.append,
                on_evaluation=lambda: show(next(calls) + 1),
            )
    found.schedule.save(out)
    _tell(found, out, json=json)


def _tell(found: Any, out: Path, *, json: bool) -> None:
    rows = [(name, told, "stock") for name, told in found.stock.items()]
    rows += [(each.name, each.held_out, "taken" if each.accepted else "left") for each in found.rungs]
    if json:
        told = [{"name": name, **figures, "verdict": verdict} for name, figures, verdict in rows]
        record = dict(found.schedule.meta)
        print_json({"improved": found.improved, "rows": told, "schedule": str(out), "meta": record})
        return
    best, shown = found.stock[found.baseline]["mean"], ("mean", "median", "p95")
    print_table(
        ["solver", "mean", "median", "95 %", "of the best stock", ""],
        [
            [name, *(f"{f[figure]:.5f}" for figure in shown), f"{f['mean'] / best:.2f}", verdict]
            for name, f, verdict in rows
        ],
        right=["mean", "median", "95 %", "of the best stock"],
    )
    typer.echo("Squared distance of final latents from the converged ones, on pairs that were not fitted to.")
    if not found.improved:
        typer.echo(f"Nothing beat {found.baseline}, which is what the file holds.")
    typer.echo(str(out))
