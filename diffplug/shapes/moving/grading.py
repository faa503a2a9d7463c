"""A grader of videos that knows every frame: which facts of the first frame are kept, and how things move.

The picture grader finds the objects of each frame. The facts are those of frame 0: the background, how many
objects there are, and the colour, shape and size of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diffplug.shapes.grading import Blob, Images, as_pixels, find
from diffplug.shapes.moving.world import REACH, SPEEDS
from diffplug.shapes.world import IMAGE_SIZE

__all__ = ["VideoGrades", "grade_video"]

Seen = tuple[str, list[Blob]]

_STEP_SLACK = 0.6  # pixels that a step may differ from the usual one: the grader finds centres to about .2
_SIZE_SLACK = 1.5  # pixels that a radius may differ


@dataclass(frozen=True)
class VideoGrades:
    """What a video keeps.

    facts: of frame 0, in words. kept: [f] float64, the share of them that holds in each frame. paths: for
    each object of frame 0 its centres [f, 2] in pixels, NaN where it is not found. speeds: median step of
    each object, pixels a frame. steady: the share of steps that are as long as the usual one, or shorter by a
    bounce; NaN where nothing was tracked.
    """

    facts: tuple[str, ...]
    kept: np.ndarray
    paths: np.ndarray
    speeds: tuple[float, ...]
    steady: float

    @property
    def mean(self) -> float:
        """The mean share of facts kept over all frames."""
        return float(self.kept.mean())


def grade_video(frames: Images | Tensor | Sequence[object]) -> VideoGrades:
    """Return the grades of one video [f, 3, h, w] in [0, 1], array or PIL pictures; about 5 ms a frame.

    Raises ValueError for other layouts, and for a first frame without any object.
    """
    seen = find(as_pixels(frames))  # type: ignore[arg-type]
    ground, things = seen[0]
    known = [thing for thing in things if thing.shape is not None]
    if not known:
        raise ValueError("the first frame shows no object of the Shapes world: there is nothing to keep")
    rows = [_facts(ground, len(things), known, frame) for frame in seen]
    paths = np.stack([_path(thing, seen) for thing in known])
    steps = np.linalg.norm(np.diff(paths, axis=1), axis=2)
    speeds = tuple(_median(row) for row in steps)
    return VideoGrades(
        facts=tuple(name for name, _ in rows[0]),
        kept=np.array([np.mean([true for _, true in row]) for row in rows]),
        paths=paths,
        speeds=speeds,
        steady=_steady(paths, steps, speeds, [thing.radius for thing in known]),
    )


def _facts(ground: str, count: int, known: list[Blob], frame: Seen) -> list[tuple[str, bool]]:
    """Return each fact of frame 0 with its truth in a frame."""
    there, blobs = frame
    facts = [(f"on {ground}", there == ground), (f"{count} objects", len(blobs) == count)]
    for thing in known:
        alike = [b for b in blobs if (b.color, b.shape) == (thing.color, thing.shape)]
        facts.append((f"a {thing.color} {thing.shape}", bool(alike)))
        same = any(abs(b.radius - thing.radius) <= _SIZE_SLACK for b in alike)
        facts.append((f"the {thing.color} {thing.shape} is as large", same))
    return facts


def _path(thing: Blob, seen: Sequence[Seen]) -> np.ndarray:
    """Return the centres [f, 2] of an object: in each frame the blob of its colour nearest to the last."""
    at, path = (thing.x, thing.y), np.full((len(seen), 2), np.nan)
    for number, (_, blobs) in enumerate(seen):
        alike = [b for b in blobs if b.color == thing.color]
        if alike:
            found = min(alike, key=lambda b: math.dist((b.x, b.y), at))
            at = (found.x, found.y)
            path[number] = at
    return path


def _median(steps: np.ndarray) -> float:
    known = steps[~np.isnan(steps)]
    return float(np.median(known)) if len(known) else math.nan


def _steady(paths: np.ndarray, steps: np.ndarray, speeds: tuple[float, ...], radii: Sequence[float]) -> float:
    """Return the share of steps that agree with constant speed, over all objects.

    A step is right where it has the usual length; where a bounce off the border is due, it may be shorter.
    """
    right: list[bool] = []
    for path, row, usual, radius in zip(paths, steps, speeds, radii, strict=True):
        due = _bounces(path, usual, radius)
        for number, step in enumerate(row):
            shorter = bool(due[number]) and step < usual
            right.append(bool(shorter or abs(step - usual) <= _STEP_SLACK))  # NaN is not right
    return float(np.mean(right)) if right else math.nan


def _bounces(path: np.ndarray, usual: float, radius: float) -> np.ndarray:
    """Return for which steps [f - 1] an object begins or ends within a step of where it turns back."""
    low = radius * REACH + 1 + min(usual, SPEEDS[1]) + _STEP_SLACK
    near = np.any((path < low) | (path > IMAGE_SIZE - low), axis=1)
    return near[1:] | near[:-1]
