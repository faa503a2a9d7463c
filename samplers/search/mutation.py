"""Small changes and crossings of schedules, on the values of a `ScheduleSpace`: always valid ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffplug.samplers.search.space import Dimension, ScheduleSpace, Values

__all__ = ["crossed", "mutated", "random_values"]

RATES = (0.03, 0.4)
"""How many of the decisions change in a mutation, drawn anew for each: some children are near, some far."""

WALK = {"gap": 0.5, "mix": 0.4, "scale": 0.2}
"""The largest standard deviations of the steps that real numbers take; the smallest are a tenth of it."""

EAGER = {"gap": 2.0}
"""Kinds of numbers that change more often than others."""

WHOLE_LISTS = 0.5
"""How often a crossing takes a kind of decision as a whole, not step by step."""


def random_values(space: ScheduleSpace, rng: np.random.Generator) -> Values:
    """Values drawn independently and evenly: mostly bad schedules."""
    return {dimension.name: _drawn(dimension, rng) for dimension in space.dimensions}


def mutated(space: ScheduleSpace, values: Mapping[str, object], rng: np.random.Generator) -> Values:
    """A copy with some decisions changed, at least one."""
    found = dict(values)
    while found == dict(values):
        rate, width = _log_uniform(*RATES, rng), _log_uniform(0.1, 1.0, rng)
        for dimension in space.dimensions:
            kind = dimension.name.partition("_")[0]
            if rng.random() < rate * EAGER.get(kind, 1.0):
                found[dimension.name] = _changed(dimension, kind, found[dimension.name], width, rng)
    return found


def crossed(
    space: ScheduleSpace, one: Mapping[str, object], two: Mapping[str, object], rng: np.random.Generator
) -> Values:
    """A child of two: each kind of decision from one of them, as a whole or step by step."""
    kinds = sorted({dimension.name.partition("_")[0] for dimension in space.dimensions})
    whole = {kind: (rng.random() < WHOLE_LISTS, rng.random() < 0.5) for kind in kinds}
    found: Values = {}
    for dimension in space.dimensions:
        together, from_one = whole[dimension.name.partition("_")[0]]
        chosen = from_one if together else rng.random() < 0.5
        found[dimension.name] = (one if chosen else two)[dimension.name]
    return found


def _drawn(dimension: Dimension, rng: np.random.Generator) -> object:
    if dimension.real:
        return float(rng.uniform(dimension.low, dimension.high))
    return dimension.choices[int(rng.integers(len(dimension.choices)))]


def _changed(
    dimension: Dimension, kind: str, value: object, width: float, rng: np.random.Generator
) -> object:
    if not dimension.real:
        return _drawn(dimension, rng)
    if kind == "scale" and rng.random() < 0.2:
        return 0.0
    moved = float(value) + rng.normal(0, width * WALK[kind])  # type: ignore[arg-type]
    return float(np.clip(moved, dimension.low, dimension.high))


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
