"""`diffplug score-adapter`: how near a SpeedUpNet adapter comes to guidance on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffplug.cli.console import guarded, print_json
from diffplug.cli.options import Device, Dtype, Json

Adapter = Annotated[Path | None, typer.Argument(help="The adapter's file; without one, the shipped one.")]
On = Annotated[str, typer.Option("--on", help="The model: shapes (embedded), a folder, or a hub id.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file, a prompt a line; Shapes has its own.")]
Negatives = Annotated[
    Path | None, typer.Option(help="Text file, a negative prompt a line; Shapes has its own.")
]
Scale = Annotated[
    float | None,
    typer.Option("--guidance", min=1, max=1000, help="Guidance scale; the adapter's own if not given."),
]
Runs = Annotated[int, typer.Option(min=1, help="Pairs of prompts to draw.")]
States = Annotated[int, typer.Option(min=1, help="Noised pictures to compare single evaluations on.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of a run.")]


@guarded
def score_adapter(
    file: Adapter = None,
    on: On = "shapes",
    prompts: Prompts = None,
    negatives: Negatives = None,
    guidance: Scale = None,
    runs: Runs = 32,
    states: States = 256,
    steps: Steps = 25,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Score a SpeedUpNet adapter on a model, its own base or a fine-tune: no pictures are needed.

    Example: `diffplug score-adapter student/speedupnet.safetensors --on ./my-fine-tune --prompts p.txt
    --negatives n.txt`

    0 is guidance itself, 1 no guidance at all. Small changes of the base, a style, cost a few hundredths.
    """
    from diffplug.cli.pipeline import load_pipeline
    from diffplug.training.speedupnet.adapter_score import score_adapter as scored

    told, unwanted = _words(prompts, negatives, on, runs)
    pipe = load_pipeline(on, device, dtype, [])
    pipe.set_progress_bar_config(disable=True)
    score = scored(pipe, file, told, unwanted, guidance=guidance, states=states, steps=steps)
    if json:
        print_json({"adapter": str(file) if file else "shipped", "on": on, **score.to_json()})
    else:
        typer.echo(str(score))


def _words(
    prompts: Path | None, negatives: Path | None, model: str, count: int
) -> tuple[list[str], list[str]]:
    """Return `count` prompts and negative prompts, from files or the Shapes world's own."""
    from diffplug.cli.pipeline import prompts_of
    from diffplug.training.speedupnet.negatives import pool_of

    told = prompts_of(prompts, model, count, 0)
    if negatives is None:
        pool = pool_of("shapes" if model == "shapes" else "quality")
        return told, [pool[(7 * i) % len(pool)] for i in range(count)]
    return told, prompts_of(negatives, "", count, 0)
