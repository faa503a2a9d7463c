"""`diffplug schedule measure`, `import`, `export`, `plot`: schedules from elsewhere, what they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json
from diffplug.cli.options import Device, Dtype, FirstSeed, Guidance, Json, Levels, Model, Prompts, ScheduleOut
from diffplug.cli.pipeline import levels_of_model, pipe_and_prompts
from diffplug.files import output_file

SUFFIX = ".statistics.safetensors"
app = typer.Typer(no_args_is_help=True, help="Schedules from elsewhere, for elsewhere, and drawn.")


@app.command()
@guarded
def measure(
    model: Model = "shapes",
    prompts: Prompts = None,
    guidance: Guidance = None,
    pairs: Annotated[int, typer.Option(min=1, max=100_000, help="Pairs of prompt and noise.")] = 16,
    points: Annotated[int, typer.Option(min=8, max=2000, help="Noise levels to measure at.")] = 60,
    elements: Annotated[
        bool,
        typer.Option("--elements", help="For each element of the latents, not each channel: many pairs."),
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Prompts in one call of the pipeline.")] = 16,
    seed: FirstSeed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Safetensors file to write.")] = Path(
        f"model{SUFFIX}"
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Measure what "ems" steps (DPM-Solver-v3) need to know of a model; twice --points evaluations.

    Example: `diffplug schedule measure --model FOLDER --prompts prompts.txt --guidance 7.5 -o s.safetensors`
    """
    output_file(out)
    pipe, words = pipe_and_prompts(model, device, dtype, prompts, pairs, seed)
    from diffplug.samplers.search.model_statistics import pipeline_statistics

    found = pipeline_statistics(
        pipe, words, guidance, points=points, elements=elements, max_rows=rows, seed=seed
    )
    found.save(out)
    if json:
        figures = {"shape": list(found.shape), "points": len(found.lambdas)}
        print_json({"file": str(out), **figures, **found.told})
        return
    shape = " x ".join(map(str, found.shape)) or "one number"
    typer.echo(f"{len(found.lambdas)} noise levels, {shape}, guidance {found.told['guidance']}: {out}")


@app.command(name="import")
@guarded
def from_usf(
    file: Annotated[Path, typer.Argument(help="A .pth file of thu-nics/USF.")],
    times: Annotated[
        str, typer.Option(help="What its timesteps mean: edm, vp (ScoreSDE), or model (--model's own).")
    ] = "model",
    model: Levels = "shapes",
    mean: Annotated[
        str | None, typer.Option(help="Mean of the data by channel, as 0.1,0.2,0.3, if it begins with it.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="For steps that need them: a file of `schedule measure`, or a folder of DPM-Solver-v3."
        ),
    ] = None,
    ends: Annotated[
        str | None, typer.Option(help="Smallest and largest time of a folder of DPM-Solver-v3: 0.002,80.")
    ] = None,
    out: ScheduleOut = Path("schedule.json"),
) -> None:
    """Read a published schedule of USF; the file's code is not run.

    Example: `diffplug schedule import stable_diffusion_nfe5.pth --model runwayml/... -o five.json`
    """
    from dataclasses import replace

    from diffplug.samplers.usf import load_usf

    output_file(out)
    clock = levels_of_model(model) if times == "model" else times
    schedule = load_usf(file, clock, mean=_floats(mean))
    needs = [i for i, step in enumerate(schedule.steps) if step.param == "ems"]
    for option, value in (("statistics", statistics), ("ends", ends)):
        if value is not None and not needs:
            raise ValueError(
                f"--{option} is for steps of DPM-Solver-v3, and this file has none: leave it out"
            )
    if ends is not None and (statistics is None or not statistics.is_dir()):
        raise ValueError(
            f"--ends {ends} is of a folder of DPM-Solver-v3: give --statistics FOLDER, or no ends"
        )
    if statistics is not None and needs:
        schedule = replace(schedule, statistics=str(_statistics(statistics, clock, _floats(ends), out)))
    schedule.save(out)
    typer.echo(f"{schedule.nfe} evaluations, {len(schedule.steps)} steps: {out}")
    if needs and statistics is None:
        typer.echo(
            f"steps {needs} need the model's statistics (DPM-Solver-v3), and the file names none: measure "
            "them (diffplug schedule measure), and import again with --statistics"
        )


def _statistics(given: Path, clock: Any, ends: Any, out: Path) -> Path:
    """A file of statistics, checked; those of a folder of DPM-Solver-v3 are written beside the schedule."""
    if not given.is_dir():
        from diffplug.samplers.solver.statistics import ModelStatistics

        ModelStatistics.load(given)
        return given.absolute()
    made = out.with_suffix(SUFFIX)
    from diffplug.samplers.usf import load_ems

    load_ems(given, clock, ends=ends).save(made)
    return made.absolute()


@app.command(name="export")
@guarded
def to_list(
    file: Annotated[Path, typer.Argument(help="A schedule, JSON.")],
    model: Levels = "shapes",
    kind: Annotated[
        str, typer.Option(help="sigmas (ComfyUI, k-diffusion) or timesteps (Diffusers).")
    ] = "sigmas",
) -> None:
    """Print a schedule's grid as a plain list, for programs that take one; the rest of the solver is lost.

    Example: `diffplug schedule export five.json --kind sigmas`
    """
    from diffplug.samplers.schedule.schedule import SolverSchedule

    schedule = SolverSchedule.load(file)
    from diffplug.samplers.usf import export_grid

    numbers = export_grid(schedule, levels_of_model(model), kind)
    typer.echo(", ".join(f"{value:.7g}" for value in numbers))


@app.command()
@guarded
def plot(
    file: Annotated[Path, typer.Argument(help="A schedule, JSON.")],
    model: Levels = "shapes",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG file; else beside the schedule.")
    ] = None,
) -> None:
    """Draw a schedule: a bar from node to node, as high as the order, a ring where a corrector follows.

    Example: `diffplug schedule plot five.json`
    """
    from diffplug.demos.schedule_plots import plot_schedule
    from diffplug.samplers.schedule.schedule import SolverSchedule

    schedule = SolverSchedule.load(file)
    picture = output_file(out or file.with_suffix(".png"))
    plot_schedule(schedule, levels_of_model(model), picture)
    typer.echo(str(picture))


def _floats(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"mean or ends {text!r}: give numbers with commas") from None
