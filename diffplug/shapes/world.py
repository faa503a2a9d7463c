"""The Shapes world: what there is to see, as values.

A scene is a background and one to three flat objects. Everything that renders, describes, parses or grades a
scene takes its words and numbers from here, so the vocabulary has one home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
"""Height and width of a picture in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (35, 70, 225),
    "yellow": (250, 215, 20),
    "purple": (140, 40, 170),
    "orange": (250, 130, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (136, 136, 136),
    "black": (0, 0, 0),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
HELD_OUT_SHAPE = "star"
"""A shape that the base model has never seen: something for a tuner to teach it."""

SIZES: dict[str, tuple[float, float]] = {"small": (6.0, 7.0), "large": (10.0, 11.5)}
"""Range of the radius in pixels of each size word."""

LARGE_FROM = 8.4
"""Radius in pixels from which an object counts as large."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS: tuple[str, ...] = ("one", "two", "relation", "three")
"""Kinds of scene: one object, two anywhere, two whose relation is told, three anywhere."""

_GAP = 3.0  # empty pixels kept between two objects
_REACH = 1.2  # an object stays within this many radii of its centre
_RELATION_REACH = 16.0  # least distance along the axis of a relation


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: a shape of a colour, centred at (x, y) with a radius, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """ "small" or "large"."""
        return "large" if self.radius >= LARGE_FROM else "small"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and its objects; `relation` is what the first object is to the second, if told."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


def holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a point stands in a relation to another: within 45 degrees of that direction, 4 pixels away or
    more.

    `a` and `b` are (x, y) in pixels, y growing downwards.
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > 4.0 and along > abs(across)


def sample_scene(rng: np.random.Generator, kind: str, *, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """A random scene of a kind, all of its objects different and apart from each other."""
    if kind not in KINDS:
        raise ValueError(f"scene kind {kind!r} is not known: take one of {', '.join(KINDS)}.")
    count = {"one": 1, "two": 2, "relation": 2, "three": 3}[kind]
    looks = _draw_looks(rng, count, shapes)
    sizes = _draw_sizes(rng, count)
    relation = str(rng.choice(RELATIONS)) if kind == "relation" else None
    places = _place(rng, sizes, relation)
    things = tuple(
        Thing(shape=shape, color=color, x=x, y=y, radius=radius)
        for (shape, color), radius, (x, y) in zip(looks, sizes, places, strict=True)
    )
    return Scene(background=str(rng.choice(list(BACKGROUNDS))), things=things, relation=relation)


def _draw_looks(rng: np.random.Generator, count: int, shapes: tuple[str, ...]) -> list[tuple[str, str]]:
    """`count` different (shape, colour) pairs."""
    colors = list(COLORS)
    picks = rng.choice(len(shapes) * len(colors), size=count, replace=False)
    return [(shapes[int(i) // len(colors)], colors[int(i) % len(colors)]) for i in picks]


def _draw_sizes(rng: np.random.Generator, count: int) -> list[float]:
    """Radii in pixels; three objects leave room for one large one at most."""
    words = ["large" if rng.random() < 0.5 else "small" for _ in range(count)]
    if count == 3:
        words = ["small"] * 3
        words[int(rng.integers(3))] = "large" if rng.random() < 0.5 else "small"
    return [float(rng.uniform(*SIZES[word])) for word in words]


def _place(rng: np.random.Generator, radii: list[float], relation: str | None) -> list[tuple[float, float]]:
    """Centres that keep the objects in the picture, apart, and in the relation asked for (by rejection)."""
    while True:
        places = [
            (
                float(rng.uniform(r * _REACH + 1, IMAGE_SIZE - r * _REACH - 1)),
                float(rng.uniform(r * _REACH + 1, IMAGE_SIZE - r * _REACH - 1)),
            )
            for r in radii
        ]
        if _apart(places, radii) and (relation is None or _clearly(relation, places[0], places[1])):
            return places


def _apart(places: list[tuple[float, float]], radii: list[float]) -> bool:
    return all(
        math.dist(places[i], places[j]) >= (radii[i] + radii[j]) * _REACH + _GAP
        for i in range(len(places))
        for j in range(i)
    )


def _clearly(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """A narrower cone than `holds` asks for, so that nobody doubts the relation in a rendering."""
    dx, dy = abs(b[0] - a[0]), abs(b[1] - a[1])
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return holds(relation, a, b) and along >= _RELATION_REACH and along >= 1.5 * across
