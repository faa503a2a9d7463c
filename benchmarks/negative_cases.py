"""Prompts with negative prompts on Shapes whose obedience can be counted.

Each case is a prompt that leaves the colour open ("a circle and a square") and a colour that is not wanted.
An empty negative prompt draws it in a quarter of the cases; so obedience is earned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffplug.shapes.grading import as_pixels, find
from diffplug.shapes.world import BACKGROUNDS, COLORS, SHAPES, SIZES

__all__ = ["Case", "Obedience", "cases", "judge", "kinds_of_negatives"]


@dataclass(frozen=True)
class Case:
    """A prompt, how many objects it asks for, and a colour that it does not want."""

    prompt: str
    objects: int
    negative: str


@dataclass(frozen=True)
class Obedience:
    """Shares of n pictures: `violation`, the colour is there; `objects`, as many objects as asked for."""

    n: int
    violation: float
    objects: float


def cases(n: int = 60, seed: int = 0) -> list[Case]:
    """Return n cases, the same for the same seed: one object in a third of them, else two."""
    rng = np.random.default_rng([seed, 101])
    found = []
    for i in range(n):
        shapes = [str(rng.choice(SHAPES)) for _ in range(1 if i % 3 == 0 else 2)]
        text = " and ".join(f"a {shape}" for shape in shapes)
        found.append(Case(text, len(shapes), str(rng.choice(list(COLORS)))))
    return found


def kinds_of_negatives(prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Return a negative prompt for each prompt, of seven kinds in turn.

    A colour, a thing, a background, a shape or size, another prompt, the prompt on another background, and a
    part of the prompt.
    """
    rng = np.random.default_rng([seed, 7])
    return [_negative(i % 7, prompt, prompts, rng) for i, prompt in enumerate(prompts)]


def _negative(kind: int, prompt: str, prompts: Sequence[str], rng: np.random.Generator) -> str:
    words = prompt.split()
    start = int(rng.integers(len(words)))
    ground = f" on a {rng.choice(list(BACKGROUNDS))} background"
    made = (
        str(rng.choice(list(COLORS))),
        f"a {rng.choice(list(COLORS))} {rng.choice(SHAPES)}",
        ground.strip(),
        str(rng.choice([*SHAPES, *SIZES])),
        prompts[int(rng.integers(len(prompts)))],
        re.sub(r" (?:on|against) a \w+ background", "", prompt) + ground,
        " ".join(words[start : start + int(rng.integers(1, 5))]),
    )
    return made[kind]


def judge(images: Any, told: Sequence[Case]) -> Obedience:
    """Return how pictures obey their cases."""
    seen = find(as_pixels(images))
    there = [
        any(blob.color == case.negative for blob in blobs)
        for (_, blobs), case in zip(seen, told, strict=True)
    ]
    right = [len(blobs) == case.objects for (_, blobs), case in zip(seen, told, strict=True)]
    return Obedience(len(told), float(np.mean(there)), float(np.mean(right)))
