"""`diffplug search tune`: a schedule moved up the gradient of a reward."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffplug.cli_few_step import FewStepName, with_few_step
from diffplug.cli_options import Device, Dtype, FirstSeed, Guidance, Json, Model, Prompts, ScheduleOut
from diffplug.cli_search_files import pipe_and_prompts
from diffplug.console import guarded, print_json, print_table, until_stopped
from diffplug.files import output_file

Start = Annotated[
    str, typer.Argument(help="Schedule file to begin with, or a preset's name with --evaluations.")
]
Evaluations = Annotated[int | None, typer.Option(min=2, max=100, help="Of a preset; a file has its own.")]
Grid = Annotated[str | None, typer.Option(help="Of a preset; linspace if not given.")]
RewardSpec = Annotated[
    str, typer.Option("--reward", help="Differentiable: clip, shapes-clip, 0.7*clip+0.3*aesthetic, ...")
]
Steps = Annotated[int, typer.Option(min=1, help="Of the descent.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at a step.")]
Rate = Annotated[float, typer.Option(min=0, help="Learning rate of the weights.")]
Every = Annotated[int, typer.Option("--check-every", min=1, help="Steps between looks at other prompts.")]
Count = Annotated[int, typer.Option("--prompt-count", min=3, help="Prompts of the Shapes model to take.")]
Validation = Annotated[int, typer.Option(min=1, help="Pairs that choose.")]
Test = Annotated[int, typer.Option(min=1, help="Pairs that only judge.")]
Ceiling = Annotated[float, typer.Option(min=0, help="Latent error allowed, over that of the start.")]
Checkpoints = Annotated[
    bool, typer.Option(help="Keep one evaluation's activations in memory, and compute them twice.")
]


@guarded
def tune(
    start: Start,
    reward: RewardSpec,
    evaluations: Evaluations = None,
    grid: Grid = None,
    model: Model = "shapes",
    prompts: Prompts = None,
    prompt_count: Count = 600,
    guidance: Guidance = None,
    few_step: FewStepName = None,
    steps: Steps = 400,
    batch: Batch = 16,
    rate: Rate = 4e-3,
    check_every: Every = 25,
    validation: Validation = 64,
    test: Test = 64,
    ceiling: Ceiling = 1.0,
    checkpoints: Checkpoints = True,
    truth: Annotated[int, typer.Option(min=2, help="Evaluations of the converged result.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Prompts in one call of the pipeline.")] = 64,
    seed: FirstSeed = 0,
    out: ScheduleOut = Path("tuned.json"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Moves a schedule's numbers up the gradient of a reward: better pictures from as many evaluations.

    Example: `diffplug search tune five.json --reward shapes-clip --guidance 5 -o tuned.json`, then
    `diffplug generate "a red circle" --sampler tuned.json --steps 5 --guidance 5`

    Interrupted, the same command goes on from the last look at other prompts.
    """
    output_file(out)
    schedule_for = _start(start, evaluations, grid)
    pipe, words = pipe_and_prompts(model, device, dtype, prompts, prompt_count, seed)
    guidance = with_few_step(pipe, few_step, guidance)
    kept = out.with_suffix(".tuning.json")
    tune_schedule = import_module("diffplug.samplers.search.tuning").tune_schedule
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with (
        until_stopped(f"what was reached is in {kept}: repeat the command"),
        Progress(*columns, console=Console(stderr=True), disable=json) as bars,
    ):
        task = bars.add_task("converged results", total=steps)

        def on_step(done: int, now: float, best: float) -> None:
            text = f"step {done} of {steps}: reward {now:.4g}, best {best:.4g} on other prompts"
            bars.update(task, completed=done, description=text)

        found = tune_schedule(
            pipe, words, schedule_for(pipe), reward, guidance, steps=steps, batch=batch, rate=rate,
            check_every=check_every, validation=validation, test=test, ceiling=ceiling, truth_steps=truth,
            checkpoints=checkpoints, max_rows=rows, seed=seed, storage=kept, on_step=on_step,
        )  # fmt: skip
    found.schedule.save(out)
    _tell(found, reward, out, json=json)


def _start(start: str, evaluations: int | None, grid: str | None) -> Callable[[Any], Any]:
    """What gives the schedule of a file, or a preset between the noise levels of a pipeline."""
    if Path(start).suffix == ".json" or Path(start).exists():
        schedule = import_module("diffplug.samplers.schedule").SolverSchedule.load(start)
        if evaluations not in (None, schedule.nfe) or grid is not None:
            raise ValueError(
                f"the schedule in {start!r} has {schedule.nfe} evaluations and a grid of its own: leave out "
                "--evaluations and --grid, which are for presets"
            )
        return lambda pipe: schedule
    preset = import_module("diffplug.samplers.presets").preset(start)
    if evaluations is None:
        raise ValueError(f"the preset {start!r} needs --evaluations N; a schedule's file has its own number")
    ends_of = import_module("diffplug.samplers.search.plan").ends_of
    return lambda pipe: preset(evaluations, ends_of(pipe, grid or "linspace"))


def _tell(found: Any, reward: str, out: Path, *, json: bool) -> None:
    if json:
        told = {"start": vars(found.start), "found": vars(found.found), "seconds": found.seconds}
        print_json({"improved": found.improved, "schedule": str(out), **told})
        return
    names = ["", reward, "error", "median"]
    pairs = (("start", found.start), ("tuned", found.found))
    rows = [[name, *(f"{n:.4f}" for n in (f.reward, f.error, f.median))] for name, f in pairs]
    print_table(names, rows, right=names[1:])
    typer.echo("On prompts that nothing was chosen by; error: squared distance from the converged latents.")
    if not found.improved:
        typer.echo("Nothing was better on the prompts that choose: the file holds the start.")
    typer.echo(str(out))
