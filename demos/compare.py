"""The same prompts and seeds through several recipes, side by side: pictures, marks, evaluations, seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffplug import rewards
from diffplug.demos.contact_sheet import Cell, contact_sheet
from diffplug.recipe import Pictures, Recipe
from diffplug.recipe.batches import Batch

__all__ = [
    "DEMO_GUIDANCE",
    "DEMO_PROMPTS",
    "Judge",
    "Outcome",
    "Verdict",
    "as_tensor",
    "compare",
    "demo_recipes",
    "judge",
    "shapes_judge_for",
    "sheet",
]

DEMO_PROMPTS = (
    "a large red circle",
    "a yellow triangle and a purple cross",
    "a blue square left of an orange circle",
    "a green cross above a red square",
    "a small purple circle right of a large yellow square",
    "an orange triangle below a blue cross",
)
"""Prompts of the Shapes world, from easy to hard."""

DEMO_GUIDANCE = 5.0
"""The guidance at which the Shapes model was measured; pipelines themselves default to 7.5."""


def demo_recipes() -> list[Recipe]:
    """What `diffplug compare` shows when nothing else is asked for.

    The reward there is the share of facts that hold: one fact of four is worth 30 / 4 in log weight.
    """
    return [
        Recipe(label="DDIM, 50 steps", sampler="ddim", steps=50),
        Recipe(label="DDIM, 6 steps", sampler="ddim", steps=6),
        Recipe(label="DC-Solver, 6 steps", sampler="dc-solver", steps=6),
        Recipe(label="Searched solver, 6 steps", sampler="solver", steps=6),
        Recipe(label="4 evaluations, distilled", sampler="shapes@4", steps=4, guidance=1.0),
        Recipe(
            label="FK steering, 8 particles, 20 steps",
            sampler="ddim",
            steps=20,
            steer="fk",
            particles=8,
            strength=30.0,
        ),
    ]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of n pictures: n `scores`, and n `strict` answers where there is a truth."""

    scores: list[float]
    strict: list[bool] | None = None


Judge = Callable[[Sequence[Image.Image], Sequence[str]], Verdict]


@dataclass(frozen=True)
class Outcome:
    """What one recipe made of all prompts: its pictures, prompt by prompt, and the verdict on them."""

    recipe: Recipe
    pictures: Pictures
    verdict: Verdict | None

    def row(self) -> dict[str, Any]:
        """The figures of the table, ready for JSON: evaluations for each picture, seconds for all of them."""
        n = len(self.pictures.images)
        row: dict[str, Any] = {"label": self.recipe.label, "settings": self.recipe.settings(), "pictures": n}
        if self.verdict is not None:
            row["score"] = fmean(self.verdict.scores)
            if self.verdict.strict is not None:
                row["strict"] = fmean(self.verdict.strict)
        if reached := [reward for reward in self.pictures.rewards if reward is not None]:
            row["reward"] = fmean(reached)
        row["evaluations"] = self.pictures.evaluations / n
        row["network_calls"] = self.pictures.network.calls
        row["network_rows"] = self.pictures.network.rows
        row["seconds"] = self.pictures.seconds
        return row


def compare(
    pipe: Any,
    prompts: Sequence[str],
    recipes: Sequence[Recipe],
    *,
    images: int = 1,
    seed: int = 0,
    judge: Judge | None = None,
    max_rows: int = 64,
    on_batch: Callable[[int, Batch], None] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Return one Outcome per recipe, `images` pictures per prompt; picture i has seed `seed + i` in each.

    `on_batch(i, batch)` is told every batch of recipe i when it is done, `on_step(i, done, of)` its steps,
    `on_outcome` each outcome. Every recipe is checked on the pipeline before the first one runs. Raises
    ValueError for nothing to compare.
    """
    if not prompts or not recipes or images < 1:
        raise ValueError("nothing to compare: give at least one prompt, one recipe and one image")
    slots = [prompt for prompt in prompts for _ in range(images)]
    seeds = [seed + i for i in range(len(slots))]
    for recipe in recipes:
        recipe.check(pipe)
        if recipe.options.get("returns") == "all":
            raise ValueError(
                f"recipe {recipe.label!r}: a comparison shows one picture a place, not returns=all"
            )
    outcomes = []
    for i, recipe in enumerate(recipes):
        pictures = recipe.run(
            pipe,
            slots,
            seeds,
            max_rows=max_rows,
            on_batch=None if on_batch is None else partial(on_batch, i),
            on_step=None if on_step is None else partial(on_step, i),
        )
        verdict = judge(pictures.images, slots) if judge else None
        outcomes.append(Outcome(recipe, pictures, verdict))
        if on_outcome is not None:
            on_outcome(outcomes[-1])
    return outcomes


def judge(name: str) -> Judge:
    """A judge by a reward's name: "shapes" also knows the truth, other rewards only score."""
    if name == "shapes":
        return _shapes_judge
    reward = rewards.get(name)
    return lambda images, prompts: Verdict(rewards.score(reward, as_tensor(images), prompts).tolist())


def shapes_judge_for(prompts: Sequence[str]) -> Judge | None:
    """The Shapes judge if it understands every prompt; else None, with a warning that says why."""
    from diffplug.shapes import parse

    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError as error:
        warnings.warn(f"no marks and no scores: {error}", stacklevel=2)
        return None
    return _shapes_judge


def _shapes_judge(images: Sequence[Image.Image], prompts: Sequence[str]) -> Verdict:
    from diffplug.shapes import grade

    grades = grade(as_tensor(images), list(prompts))
    return Verdict([float(score) for score in grades.score], [bool(mark) for mark in grades.strict])


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size as [n, 3, h, w] float32 in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def sheet(outcomes: Sequence[Outcome], prompts: Sequence[str], *, title: str = "") -> Image.Image:
    """The contact sheet: a row for each prompt, a column for each recipe, a mark for each graded picture."""
    images = len(outcomes[0].pictures.images) // len(prompts)
    rows = [
        [_cell(outcome, slice(i * images, (i + 1) * images)) for outcome in outcomes]
        for i in range(len(prompts))
    ]
    graded = any(outcome.verdict and outcome.verdict.strict is not None for outcome in outcomes)
    return contact_sheet(
        rows,
        row_labels=list(prompts),
        column_labels=[_head(outcome) for outcome in outcomes],
        title=title,
        footer="Tick: every fact of the prompt holds. Cross: at least one does not." if graded else "",
    )


def _cell(outcome: Outcome, part: slice) -> Cell:
    strict = outcome.verdict.strict if outcome.verdict else None
    return Cell(outcome.pictures.images[part], strict[part] if strict else ())


def _head(outcome: Outcome) -> str:
    row = outcome.row()
    right = f"\n{row['strict']:.0%} right" if "strict" in row else ""
    return f"{outcome.recipe.label}{right}"
