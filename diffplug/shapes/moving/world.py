"""Moving Shapes: a scene whose objects move in straight lines and bounce off the border, as values.

Everything about a video of this world is known: where each object is in frame t is a formula, so a video can
be rendered to any length and a generated one graded frame by frame.

    scene = sample_moving(np.random.default_rng(0), "one")
    frames = render_video(scene, 97)                # [97, 3, 64, 64] in [0, 1]

Two objects move in lanes, both to and fro or both up and down, so that none ever covers the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffplug.shapes.rendering import render
from diffplug.shapes.world import IMAGE_SIZE, Scene, Thing, sample_scene

__all__ = [
    "MOVING_KINDS",
    "REACH",
    "SPEEDS",
    "MovingScene",
    "bounced",
    "render_video",
    "sample_moving",
    "scene_at",
]

MOVING_KINDS = ("one", "two")
"""Kinds of moving scene: the numbers of objects."""

SPEEDS = (1.0, 2.4)
"""Range of an object's speed, pixels a frame."""

REACH = 1.2
"""An object turns back where its centre is so many radii (and a pixel) from the border."""


@dataclass(frozen=True, kw_only=True)
class MovingScene:
    """A scene at frame 0, and the velocity of each object in pixels a frame, (x to the right, y down)."""

    scene: Scene
    velocities: tuple[tuple[float, float], ...]


def bounced(place: np.ndarray | float, radius: float) -> np.ndarray:
    """Return coordinates on a straight line folded back between the borders an object of `radius` turns at.

    place: any shape, pixels.
    """
    low, high = radius * REACH + 1, IMAGE_SIZE - radius * REACH - 1
    span = high - low
    there = np.mod(np.asarray(place, dtype=np.float64) - low, 2 * span)
    return low + np.minimum(there, 2 * span - there)


def scene_at(moving: MovingScene, frame: float) -> Scene:
    """Return the scene in a frame (fractions are allowed)."""
    things = tuple(
        replace(
            thing,
            x=float(bounced(thing.x + frame * vx, thing.radius)),
            y=float(bounced(thing.y + frame * vy, thing.radius)),
        )
        for thing, (vx, vy) in zip(moving.scene.things, moving.velocities, strict=True)
    )
    return replace(moving.scene, things=things)


def render_video(moving: MovingScene, frames: int | Sequence[int]) -> Tensor:
    """Return the frames of a moving scene, [f, 3, 64, 64] float32 in [0, 1].

    frames: how many, or which ones. Costs about 0.2 ms a frame.
    """
    wanted = range(frames) if isinstance(frames, int) else frames
    return render([scene_at(moving, frame) for frame in wanted])


def sample_moving(rng: np.random.Generator, kind: str) -> MovingScene:
    """Return a random moving scene: one object in any direction, or two in lanes.

    Raises ValueError for an unknown kind.
    """
    if kind not in MOVING_KINDS:
        raise ValueError(f"moving scene kind {kind!r} is not known: take one of {', '.join(MOVING_KINDS)}.")
    scene = sample_scene(rng, kind)
    if kind == "one":
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(*SPEEDS)
        return MovingScene(scene=scene, velocities=((speed * math.cos(angle), speed * math.sin(angle)),))
    along_x = bool(rng.integers(2))
    speeds = rng.uniform(*SPEEDS, size=2) * rng.choice([-1.0, 1.0], size=2)
    velocities = tuple((float(s), 0.0) if along_x else (0.0, float(s)) for s in speeds)
    return MovingScene(scene=_in_lanes(rng, scene, along_x), velocities=velocities)


def _in_lanes(rng: np.random.Generator, scene: Scene, along_x: bool) -> Scene:
    """Return a scene of two objects, placed anew so that their lanes are apart."""
    a, b = scene.things
    if rng.random() < 0.5:
        a, b = b, a
    gap = (a.radius + b.radius) * REACH + 3
    low, high = a.radius * REACH + 1, IMAGE_SIZE - b.radius * REACH - 1
    across = sorted(rng.uniform(0, high - low - gap, size=2))
    lanes = (low + across[0], low + gap + across[1])
    things = tuple(_in_lane(rng, thing, lane, along_x) for thing, lane in zip((a, b), lanes, strict=True))
    return replace(scene, things=things, relation=None)


def _in_lane(rng: np.random.Generator, thing: Thing, lane: float, along_x: bool) -> Thing:
    border = thing.radius * REACH + 1
    place = float(rng.uniform(border, IMAGE_SIZE - border))
    return replace(thing, x=place, y=lane) if along_x else replace(thing, x=lane, y=place)


def video_tensor(frames: object) -> Tensor:
    """Return frames in any usual form (tensor, array, PIL pictures; one video) as [f, 3, h, w] in [0, 1]."""
    from diffplug.shapes.grading import as_pixels

    return torch.from_numpy(as_pixels(frames)).movedim(-1, 1)  # type: ignore[arg-type]
