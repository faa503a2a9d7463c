"""`diffplug generate`: makes pictures, one file each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, print_table, progress
from diffplug.cli.options import Device, Dtype, Guidance, Images, Json, Model, Negative, Out, Seed
from diffplug.cli.pipeline import load_pipeline
from diffplug.files import output_folder


@guarded
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: Model = "shapes",
    sampler: Annotated[
        str | None, typer.Option(help="A name from `diffplug names`, or a searched .json file.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Guidance = None,
    negative_prompt: Negative = None,
    eta: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Noise of DDIM's steps: 0 none, 1 as in DDPM."),
    ] = None,
    seed: Seed = 0,
    images: Images = 1,
    steer: Annotated[
        str | None,
        typer.Option(
            help="Choose among particles by a reward: fk, svdd, best-of-n, ...; see `diffplug names`."
        ),
    ] = None,
    particles: Annotated[int, typer.Option(min=1, max=4096, help="Particles for each picture.")] = 8,
    reward: Annotated[
        str, typer.Option(help="What steering asks for: a name from `diffplug names`, or 0.7*clip+0.3*jpeg.")
    ] = "shapes",
    strength: Annotated[float | None, typer.Option(min=0, help="How much the reward counts.")] = None,
    out: Out = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Makes pictures, one PNG file each, named by the seed that made it.

    Example: `diffplug generate "a red circle left of a blue square" --sampler dc-solver --steps 6 -o out`

    Steered: `diffplug generate "a green cross" --sampler ddim --steer fk --particles 8`
    """
    from diffplug.recipe import Recipe

    _refuse_idle(steer, particles=particles, reward=reward, strength=strength)
    recipe = Recipe(
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        eta=eta,
        steer=steer,
        particles=particles,
        reward=reward,
        strength=strength,
    )
    folder = output_folder(out)
    pipe = load_pipeline(model, device, dtype, prompts)
    slots = [prompt for prompt in prompts for _ in range(images)]
    seeds = [seed + i for i in range(len(slots))]
    with progress([("pictures", len(slots))], disable=json) as advance:
        made = recipe.run(pipe, slots, seeds, on_batch=lambda n: advance(0, n))
    settings = {"model": model, **recipe.settings()}
    if made.reports and getattr(made.reports[0], "noise", ""):
        settings["noise"] = made.reports[0].noise
    rows = _saved(made.images, slots, seeds, folder, settings)
    cost = {"evaluations": made.evaluations / len(slots), "seconds": made.seconds}
    if json:
        print_json({"pictures": rows, **cost})
        return
    print_table(
        ["file", "seed", "prompt"], [[r["file"], str(r["seed"]), r["prompt"]] for r in rows], right=["seed"]
    )
    for report in made.reports[:1]:
        if "adds none by itself" in getattr(report, "noise", ""):
            typer.echo(f"{steer} duplicates particles, which part in noise: {report.noise}")
    typer.echo(f"{cost['evaluations']:.0f} network evaluations for each picture, {made.seconds:.1f} s in all")


def _refuse_idle(steer: str | None, **options: Any) -> None:
    """ValueError for options of steering that were given without --steer, where they would do nothing."""
    from diffplug.recipe import Recipe

    for name, value in options.items():
        if steer is None and value != getattr(Recipe, name):
            raise ValueError(f"--{name} {value} acts only with --steer: add --steer fk, or leave it out")


def _saved(
    pictures: list[Any], prompts: list[str], seeds: list[int], folder: Path, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from diffplug.png import save_picture

    rows = []
    for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True):
        path = save_picture(picture, folder, seed, {"prompt": prompt, **settings})
        rows.append({"file": str(path), "seed": seed, "prompt": prompt})
    return rows
