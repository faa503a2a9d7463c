"""Negative prompts to train on: nothing, words of a pool, other prompts, parts of the prompt itself.

An adapter that has only seen the empty negative cannot take any other; one that has never seen it fails where
people give none. So both are drawn, and prompts are sometimes made vague, because what a prompt leaves open
is what a negative prompt decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["NegativeSettings", "Pairs", "draw_pairs", "pool_of"]

_QUALITY = (
    "blurry",
    "low quality",
    "worst quality, low quality, jpeg artifacts",
    "bad anatomy, extra fingers, deformed hands",
    "text, watermark, signature",
    "monochrome",
    "cartoon, painting, illustration",
    "photo, photorealistic",
    "oversaturated",
    "dark",
)


@dataclass(frozen=True, kw_only=True)
class NegativeSettings:
    """The shares of the kinds of negative prompts.

    pool: a text file with one a line, "shapes" for words of the embedded world, "quality" for common words of
    negative prompts. empty: share of empty ones. others: share of captions of other pictures, own: share of
    phrases of the prompt itself, both among those that are not empty. vague: share of prompts that lose their
    colour and size words (Shapes only).
    """

    pool: str = "shapes"
    empty: float = 0.35
    others: float = 0.1
    own: float = 0.1
    vague: float = 0.15

    def __post_init__(self) -> None:
        for name in ("empty", "others", "own", "vague"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.others + self.own > 1:
            raise ValueError(
                f"others and own add up to {self.others + self.own:g}: they must leave a share of 0 or more"
            )


@dataclass(frozen=True)
class Pairs:
    """Prompts with their negative prompts."""

    positive: list[str]
    negative: list[str]


def pool_of(name: str) -> list[str]:
    """Return the pool of that name or file; ValueError for a file that is missing or empty."""
    if name == "quality":
        return list(_QUALITY)
    if name == "shapes":
        return _shapes_pool()
    file = Path(name)
    if not file.is_file():
        raise ValueError(
            f"negatives.pool {name!r} is no file: give one with a negative prompt a line, 'shapes' or "
            "'quality'"
        )
    lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    if not any(lines):
        raise ValueError(f"negatives.pool {name!r} has no line in it")
    return [line for line in lines if line]


def draw_pairs(prompts: Sequence[str], settings: NegativeSettings, seed: int) -> Pairs:
    """Return the prompts, some made vague, each with a negative prompt; the same for the same seed."""
    rng = np.random.default_rng([seed, 23])
    pool = pool_of(settings.pool)
    vague = rng.random(len(prompts)) < (settings.vague if settings.pool == "shapes" else 0.0)
    positive = [_vague(text) if loose else text for text, loose in zip(prompts, vague, strict=True)]
    return Pairs(positive, [_negative(text, prompts, pool, settings, rng) for text in positive])


def _negative(
    prompt: str,
    prompts: Sequence[str],
    pool: Sequence[str],
    settings: NegativeSettings,
    rng: np.random.Generator,
) -> str:
    if rng.random() < settings.empty:
        return ""
    kind = rng.random()
    if kind < settings.others:
        return prompts[int(rng.integers(len(prompts)))]
    if kind < settings.others + settings.own:
        words = prompt.split()
        start = int(rng.integers(len(words))) if words else 0
        return " ".join(words[start : start + int(rng.integers(1, 5))])
    return pool[int(rng.integers(len(pool)))]


def _shapes_pool() -> list[str]:
    """Return colour words (half of the pool), things, sizes, shapes and backgrounds."""
    from diffplug.shapes.world import BACKGROUNDS, COLORS, SHAPES, SIZES

    things = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    grounds = [f"on a {ground} background" for ground in BACKGROUNDS]
    colors = list(COLORS) * max(1, round((len(things) + len(grounds)) / len(COLORS)))
    return [*colors, *things, *grounds, *SIZES, *SHAPES]


def _vague(prompt: str) -> str:
    """Return a Shapes prompt without colours and sizes, and with its articles in order."""
    from diffplug.shapes.world import COLORS, SIZES

    plain = re.sub(rf"\b(?:{'|'.join((*COLORS, *SIZES))}) (?!background)", "", prompt)
    return re.sub(r"\ban (?=[^aeiou])", "a ", plain)
