"""What a search minimises: a number from the final samples of a schedule, lower the better.

A metric gives marks first, and a value of them. Marks are one number for each pair where that is possible:
then two schedules can be compared pair by pair, on some of the pairs too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from diffplug.registry import unknown
from diffplug.samplers.search.problem import Problem

__all__ = [
    "AGGREGATES",
    "FORGIVING",
    "WORST",
    "LatentError",
    "Metric",
    "RobustError",
    "check_metric",
]

Floats = npt.NDArray[np.float64]
WORST = 1e6
"""The value of what is not finite; schedules above a ceiling get this and a little more."""


def _trimmed(marks: Floats) -> float:
    kept = math.ceil(0.95 * marks.shape[-1])
    return np.sort(marks, axis=-1)[..., :kept].mean(axis=-1)


AGGREGATES: Mapping[str, Callable[[Floats], Any]] = MappingProxyType(
    {
        "mean": lambda marks: marks.mean(axis=-1),
        "trimmed": _trimmed,
        "median": lambda marks: np.median(marks, axis=-1),
        "p95": lambda marks: np.quantile(marks, 0.95, axis=-1),
        "log": lambda marks: np.log(np.maximum(marks, 1e-12)).mean(axis=-1),
    }
)
"""One number of many, along the last axis. "mean" counts pairs that end in another place; "trimmed" (without
the worst 5 %), "median" and "log" forgive some of them, and then their share has to be watched."""

FORGIVING = ("trimmed", "median", "log")
"""Aggregates that a few large marks do not move far."""


class Metric(Protocol):
    """A measure of final samples.

    name: as it is written in a file. paired: whether marks are one number for each pair. ceiling: how many
    times the latent error of the best preset a schedule may have, None for any.
    """

    @property
    def name(self) -> str: ...
    @property
    def paired(self) -> bool: ...
    @property
    def ceiling(self) -> float | None: ...

    def marks(self, problem: Problem, final: Floats) -> Floats:
        """Return scores [n] for a paired metric, or features [n, ...] that `value` compares as a set."""

    def value(self, problem: Problem, marks: Floats) -> float:
        """Return the number that is minimised; `problem` has as many pairs as there are marks."""


@dataclass(frozen=True)
class Paired:
    """Parts that metrics with a number for each pair share. aggregate: a name of `AGGREGATES`."""

    aggregate: str = "mean"
    paired: ClassVar[bool] = True
    ceiling: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise unknown("aggregate", self.aggregate, list(AGGREGATES))

    def value(self, problem: Problem, marks: Floats) -> float:
        return float(AGGREGATES[self.aggregate](marks))


@dataclass(frozen=True)
class LatentError(Paired):
    """The squared distance of final latents from the converged ones, mean over their elements."""

    @property
    def name(self) -> str:
        return "latent-mse" if self.aggregate == "mean" else f"latent-mse:{self.aggregate}"

    def marks(self, problem: Problem, final: Floats) -> Floats:
        return np.asarray(np.square(final - problem.reference).mean(axis=1))


@dataclass(frozen=True)
class RobustError(LatentError):
    """The same by the problem's robust loss: errors of pairs beyond hope count by their logarithm."""

    @property
    def name(self) -> str:
        return "robust"

    def marks(self, problem: Problem, final: Floats) -> Floats:
        return problem.loss(super().marks(problem, final))


def check_metric(metric: Metric, problem: Problem, worse: Floats) -> None:
    """Raise ValueError for a metric that gives no numbers, or says that the truth is worse than `worse`.

    worse: final samples of a solver of few steps. A reward may like them better: it is no distance.
    """
    marks = metric.marks(problem, problem.reference)
    if metric.paired and marks.shape != (len(problem.reference),):
        raise ValueError(f"metric {metric.name!r} gives {marks.shape} for {len(problem.reference)} pairs")
    if bad := int((~np.isfinite(marks)).sum()):
        raise ValueError(
            f"metric {metric.name!r} gives {bad} of {marks.size} numbers that are not finite for the "
            "converged samples: a search cannot use it"
        )
    best, other = metric.value(problem, marks), metric.value(problem, metric.marks(problem, worse))
    if metric.ceiling is None and best == other:
        raise ValueError(
            f"metric {metric.name!r} gives {best:.4g} for the converged samples and for those of a few steps "
            "alike: it cannot tell schedules apart"
        )
    if metric.ceiling is None and best > other:
        raise ValueError(
            f"metric {metric.name!r} gives {best:.4g} for the converged samples and {other:.4g} for those of "
            "a few steps: lower has to be better; give a distance, or write reward:... for what should grow"
        )
