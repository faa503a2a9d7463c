"""Prompt fidelity at equal cost: plain, best of n and Feynman-Kac steering on the Shapes test prompts.

    python -m benchmarks.fidelity --prompts 200 --seeds 3 --steps 20 --particles 8

"best" columns grade the picture that a person gets, "drawn" columns one that is drawn by the final weights
(returns="sample"), evenly from free pictures. Plain sampling runs twice: with the same steps, and with as
many evaluations as the others. Prompts are `sample_prompts(n, seed=0, kind, split="test")`; in seed s, prompt
i starts from the generator s * 10**6 + i.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.command import opened
from benchmarks.steering.pictures import shares
from diffplug.files import output_folder, write_json
from diffplug.recipe import Recipe
from diffplug.shapes import grade, sample_prompts

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the benchmark runs; every method uses the same solver, guidance, prompts and seeds.

    eta: None is what each gets by its name: DDIM without noise, and noise at the scored calls for FK.
    """

    prompts: int = 200
    seeds: int = 3
    steps: int = 20
    particles: int = 8
    kind: str = "mixed"
    guidance: float = 5.0
    strength: float | None = None
    sampler: str = "ddim"
    eta: float | None = None
    device: str = "cpu"

    def recipes(self) -> list[Recipe]:
        """The methods, cheapest first; steerers hand back every particle so that their mean is known too."""
        common: dict[str, Any] = {"sampler": self.sampler, "guidance": self.guidance, "eta": self.eta}
        steered = {**common, "steps": self.steps, "particles": self.particles, "options": {"returns": "all"}}
        equal = min(1000, self.steps * self.particles)
        return [
            Recipe(label=f"plain, {self.steps} steps", steps=self.steps, **common),
            Recipe(label=f"plain, {equal} steps", steps=equal, **common),
            Recipe(label=f"best of {self.particles}", steer="best-of-n", **steered),
            Recipe(label=f"FK, {self.particles} particles", steer="fk", strength=self.strength, **steered),
        ]


def measure(pipe: Any, recipe: Recipe, prompts: Sequence[str], seed: int, max_rows: int) -> dict[str, float]:
    """The figures of one recipe and one seed: strict share and mean score, of the best picture and of one
    that is drawn by the final weights (free draws: evenly).
    """
    seeds = [seed * 10**6 + i for i in range(len(prompts))]
    made = recipe.run(pipe, prompts, seeds, max_rows=max_rows)
    copies = len(made.images) // len(prompts)
    grades = grade(made.images, [prompt for prompt in prompts for _ in range(copies)])
    scores = np.asarray(grades.score, dtype=np.float64).reshape(len(prompts), copies)
    strict = np.asarray(grades.strict, dtype=np.float64).reshape(len(prompts), copies)
    best = (np.arange(len(prompts)), scores.argmax(1))
    drawn = shares(made, len(prompts), copies, weighted=recipe.steer == "fk")
    return {
        "strict_best": float(strict[best].mean()),
        "score_best": float(scores[best].mean()),
        "strict_mean": float((drawn * strict).sum(1).mean()),
        "score_mean": float((drawn * scores).sum(1).mean()),
        "evaluations": made.evaluations / len(prompts),
        "seconds": made.seconds,
    }


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard error over seeds for every figure; the error of a single seed is unknown (0)."""
    return {
        key: {
            "mean": fmean(run[key] for run in runs),
            "se": stdev(run[key] for run in runs) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0,
        }
        for key in runs[0]
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as a markdown table: percentages and scores with their standard errors."""
    graded = ["strict, best", "score, best", "strict, drawn", "score, drawn"]
    heads = ["method", *graded, "evaluations", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for label, figures in results.items():
        cells = [_with_error(figures[key], percent=key.startswith("strict")) for key in list(figures)[:4]]
        cells += [f"{figures['evaluations']['mean']:.0f}", f"{figures['seconds']['mean']:.0f}"]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines)


def _with_error(figure: dict[str, float], *, percent: bool) -> str:
    if percent:
        return f"{100 * figure['mean']:.1f} ± {100 * figure['se']:.1f} %"
    return f"{figure['mean']:.4f} ± {figure['se']:.4f}"


def run(setting: Setting, max_rows: int = 64) -> dict[str, Any]:
    """All methods over all seeds; the document that is written and printed."""
    pipe = opened("shapes", setting.device)
    prompts = sample_prompts(setting.prompts, seed=0, kind=setting.kind, split="test")
    recipes = setting.recipes()
    runs: dict[str, list[dict[str, float]]] = {recipe.label: [] for recipe in recipes}
    with Progress() as bars:
        bar = bars.add_task("recipes x seeds", total=len(recipes) * setting.seeds)
        for seed in range(setting.seeds):
            for recipe in recipes:
                runs[recipe.label].append(measure(pipe, recipe, prompts, seed, max_rows))
                bars.advance(bar)
    results = {label: summary(figures) for label, figures in runs.items()}
    return {"setting": vars(setting), "results": results, "runs": runs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs, prints the table and writes the JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__.splitlines()[0]
    )
    for name, default in vars(Setting()).items():
        kind = _number if name in ("guidance", "strength", "eta") else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    parser.add_argument("--max-rows", type=int, default=64, help="pictures times particles in one call")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "fidelity.json", help="where to write the document"
    )
    given = vars(parser.parse_args(arguments))
    max_rows, path = given.pop("max_rows"), given.pop("json")
    output_folder(path.parent)
    document = run(Setting(**given), max_rows)
    write_json(path, document)
    print(table(document["results"]))
    print(path)


def _number(text: str) -> float | None:
    """A number, or None for "none": the choice of the steerer or pipeline."""
    return None if text == "none" else float(text)


if __name__ == "__main__":
    main()
