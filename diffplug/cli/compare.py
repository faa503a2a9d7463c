"""`diffplug compare`: the same prompts and seeds through several recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, print_table, progress
from diffplug.cli.options import Device, Dtype, Guidance, Images, Json, Model, Out, Seed
from diffplug.cli.pipeline import load_pipeline
from diffplug.files import output_folder


@guarded
def compare(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Else the demo's own.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A recipe, key=value pairs; give it once per column.")
    ] = None,
    model: Model = "shapes",
    guidance: Guidance = None,
    seed: Seed = 0,
    images: Images = 2,
    judge: Annotated[
        str | None, typer.Option(help="Reward that judges, as for --reward; `shapes` on the Shapes model.")
    ] = None,
    out: Out = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Sends the same prompts and seeds through several recipes: a contact sheet and a table.

    Example: `diffplug compare "a red circle" --run sampler=ddim,steps=50 --run sampler=dc-solver,steps=6`

    Keys: label, sampler, steps, guidance, negative_prompt, eta, steer, particles, reward, strength.
    """
    from dataclasses import replace

    from diffplug.demos import compare as engine
    from diffplug.recipe import Recipe

    recipes = [Recipe.parse(text) for text in run] if run else engine.demo_recipes()
    if guidance is None and not run:
        guidance = engine.DEMO_GUIDANCE
    recipes = [replace(r, guidance=guidance if r.guidance is None else r.guidance) for r in recipes]
    folder = output_folder(out)
    words = list(prompts or engine.DEMO_PROMPTS)
    pipe = load_pipeline(model, device, dtype, words)
    asked = engine.judge(judge) if judge else engine.shapes_judge_for(words) if model == "shapes" else None
    with progress([(r.label, len(words) * images) for r in recipes], disable=json) as advance:
        outcomes = engine.compare(
            pipe,
            words,
            recipes,
            images=images,
            seed=seed,
            judge=asked,
            on_batch=advance,
        )
    title = f"{model}: {len(words)} prompts, seeds {seed} to {seed + len(words) * images - 1}"
    path = _save_sheet(engine.sheet(outcomes, words, title=title), folder, outcomes)
    rows = [outcome.row() for outcome in outcomes]
    if json:
        print_json({"rows": rows, "prompts": words, "seed": seed, "sheet": str(path)})
        return
    columns = ["recipe", "strict", "score", "evaluations", "seconds"]
    print_table(columns, [_cells(row) for row in rows], right=columns[1:])
    typer.echo(
        f"strict: every fact of the prompt holds. evaluations: of the network, for each picture.\n{path}"
    )


def _save_sheet(image: Any, folder: Path, outcomes: list[Any]) -> Path:
    from diffplug.files import safe_join
    from diffplug.png import save_png

    path = safe_join(folder, "compare.png")
    save_png(image, path, {"recipes": [outcome.recipe.settings() for outcome in outcomes]})
    return path


def _cells(row: dict[str, Any]) -> list[str]:
    strict = f"{row['strict']:.0%}" if "strict" in row else "-"
    score = f"{row['score']:.3f}" if "score" in row else "-"
    return [row["label"], strict, score, f"{row['evaluations']:.0f}", f"{row['seconds']:.1f}"]
