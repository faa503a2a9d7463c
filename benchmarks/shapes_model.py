"""What the embedded Shapes model can do: strict and mean score by kind of prompt, with plain DDIM.

    python -m benchmarks.shapes_model --prompts 500 --steps 50 --guidance 5

Prompts come from the test split, whose contents the model was never trained on; prompt i of a kind starts
from the generator i. Also measures the autoencoder: how many renderings the grader still passes after a round
trip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.command import opened
from diffplug.demos.contact_sheet import Cell, contact_sheet
from diffplug.files import atomic_path, output_folder, write_json
from diffplug.recipe import Recipe
from diffplug.shapes import caption, grade, render, sample_prompts, sample_scene
from diffplug.shapes.world import KINDS

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def round_trip(pipe: Any, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """Strict share of renderings before and after the autoencoder, and the mean squared error in [0, 1]."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, KINDS[i % len(KINDS)]) for i in range(n)]
    prompts = [caption(scene, rng) for scene in scenes]
    images = render(scenes)
    decoded = torch.cat(
        [
            pipe.vae.decode(pipe.vae.encode(x * 2 - 1).latent_dist.mode()).sample.cpu()
            for x in images.split(100)
        ]
    )
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    return {
        "renderings strict": float(grade(images, prompts).strict.mean()),
        "round trip strict": float(grade(decoded, prompts).strict.mean()),
        "round trip mse": float((decoded - images).square().mean()),
    }


def measure(pipe: Any, kind: str, arguments: argparse.Namespace) -> tuple[dict[str, float], list[Cell]]:
    """Strict share (with standard error), score and seconds of a kind of prompt; its first eight pictures."""
    prompts = sample_prompts(arguments.prompts, seed=0, kind=kind, split="test")
    recipe = Recipe(sampler=arguments.sampler, steps=arguments.steps, guidance=arguments.guidance)
    made = recipe.run(pipe, prompts, list(range(len(prompts))), max_rows=100)
    grades = grade(made.images, prompts)
    figures = {
        "strict": float(grades.strict.mean()),
        "se": float(grades.strict.std() / np.sqrt(len(prompts))),
        "score": float(grades.score.mean()),
        "seconds": made.seconds,
    }
    cells = [
        Cell([image], [bool(good)]) for image, good in zip(made.images[:8], grades.strict[:8], strict=True)
    ]
    return figures, cells


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a markdown table."""
    lines = ["| prompts | strict | mean score | seconds |", "|---|---|---|---|"]
    for kind, row in results.items():
        strict = f"{100 * row['strict']:.1f} ± {100 * row['se']:.1f} %"
        lines.append(f"| {kind} | {strict} | {row['score']:.4f} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs, prints the tables, writes JSON and, if asked, a contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--model", default="shapes", help="shapes, or the folder of a training run's pipeline"
    )
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet (PNG)")
    parser.add_argument("--json", type=Path, default=RESULTS / "shapes_model.json")
    given = parser.parse_args(arguments)
    output_folder(given.json.parent)
    pipe = opened(given.model, "cpu")
    trip = round_trip(pipe)
    results, sheet = {}, []
    with Progress() as bars:
        for kind in bars.track(given.kinds, description="kinds of prompt"):
            results[kind], cells = measure(pipe, kind, given)
            sheet.append(cells)
    print("\n".join(f"{name}: {value:.5f}" for name, value in trip.items()))
    print(table(results))
    write_json(
        given.json,
        {"setting": {**vars(given), "json": None, "sheet": None}, "autoencoder": trip, "results": results},
    )
    if given.sheet:
        labels = [f"{kind}: {100 * results[kind]['strict']:.0f} % strict" for kind in given.kinds]
        picture = contact_sheet(
            sheet, row_labels=labels, column_labels=[f"test prompt {i}" for i in range(1, 9)], size=112
        )
        with atomic_path(given.sheet) as temporary:
            picture.save(temporary)
        print(given.sheet)


if __name__ == "__main__":
    main()
