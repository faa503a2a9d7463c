"""Prompts with negative prompts on Shapes whose obedience can be counted.

Each case is a prompt that leaves the colour open ("a circle and a square") and a colour that is not wanted.
An empty negative prompt draws it in a quarter of the cases; so obedience is earned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffplug.shapes.grading import as_pixels, find
from diffplug.shapes.world import COLORS, SHAPES

__all__ = ["Case", "Obedience", "cases", "judge"]


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


def judge(images: Any, told: Sequence[Case]) -> Obedience:
    """Return how pictures obey their cases."""
    seen = find(as_pixels(images))
    there = [
        any(blob.color == case.negative for blob in blobs)
        for (_, blobs), case in zip(seen, told, strict=True)
    ]
    right = [len(blobs) == case.objects for (_, blobs), case in zip(seen, told, strict=True)]
    return Obedience(len(told), float(np.mean(there)), float(np.mean(right)))
