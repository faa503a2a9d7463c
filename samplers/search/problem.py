"""What a search minimises: the distance of a solver's final samples from the converged ones, pair by pair.

With few evaluations and much guidance some pairs end in another picture than the converged one, whatever the
solver does. Their errors are as large as pictures differ, a mean of squares is mostly theirs, and what lowers
it is to blur. The robust loss grows with the logarithm there and leaves a fit to the pairs that can be had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffplug.network.cache import NetworkCache
from diffplug.registry import unknown
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule

__all__ = ["LOSSES", "SQUARED", "Errors", "Loss", "Problem", "Run", "check_loss", "errors", "loss_of"]

Floats = npt.NDArray[np.float64]
LOSSES = ("squared", "robust")
ROBUST_SHARE = 0.1  # of the variance of converged samples: errors above it count less and less


@dataclass(frozen=True)
class Run:
    """A run of n pairs, flattened to d numbers each, float64.

    final: [n, d]. states: [N, n, d], the (corrected) state that each step starts from. data: [N, n, d], the
    data predictions before any compensation.
    """

    final: Floats
    states: Floats
    data: Floats


@dataclass(frozen=True)
class Loss:
    """Loss of squared errors, each the mean over a pair's numbers.

    scale: None counts them as they are; else Cauchy's loss, scale * log(1 + error / scale): nearly the error
    below the scale, its logarithm above.
    """

    scale: float | None = None

    def __call__(self, of_pairs: Floats) -> Floats:
        """Return the losses [n] of squared errors [n]; an infinite one stays infinite."""
        return of_pairs if self.scale is None else self.scale * np.log1p(of_pairs / self.scale)

    def residuals(self, off: Floats) -> Floats:
        """Return numbers whose squares sum up to the mean loss of differences [n, d], for least squares."""
        if self.scale is not None:
            of_pairs = np.square(off).mean(axis=1, keepdims=True)
            off = off * np.sqrt(self(of_pairs) / np.maximum(of_pairs, np.finfo(np.float64).tiny))
        return off.ravel() / np.sqrt(off.size)


SQUARED = Loss()


class Problem(Protocol):
    """n pairs of start noise and prompt, with the samples that a converged solver reaches from them."""

    levels: NoiseLevels
    loss: Loss
    """What fits make small of the errors of pairs."""

    @property
    def network_cache(self) -> NetworkCache:
        """Counts the network evaluations so far, each over all pairs; problems of one search may share it."""

    def final(self, schedule: SolverSchedule) -> Floats:
        """Return the final samples [n, d] of a schedule."""

    def run(self, schedule: SolverSchedule) -> Run:
        """Return a run of a schedule, with what happened on the way."""

    @property
    def reference(self) -> Floats:
        """The converged final samples [n, d]."""

    def reference_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        """Return the converged states [N + 1, n, d] at a schedule's nodes, from so many evaluations."""

    def predictions(self, schedule: SolverSchedule, states: Floats) -> Floats:
        """Return data predictions [N, n, d] at states [N, n, d]; the first ones are those of the start."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample, before it is flattened to d numbers; known once something was run."""

    def part(self, begin: int, end: int) -> Problem:
        """Return the problem on pairs begin ... end - 1; their reference is not computed again."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of every pair; empty ones where there are none."""

    def pictures(self, final: Floats) -> Tensor:
        """Return the pictures [n, 3, h, w] of final samples, float32 in [0, 1]; ValueError for none."""


@dataclass(frozen=True)
class Errors:
    """Mean squared errors [n] of the final samples, pair by pair, and what a loss makes of them."""

    of_pairs: Floats
    loss: Loss = SQUARED

    @property
    def mean(self) -> float:
        return float(self.of_pairs.mean())

    @property
    def p95(self) -> float:
        return float(np.quantile(self.of_pairs, 0.95))

    @property
    def median(self) -> float:
        return float(np.median(self.of_pairs))

    @property
    def mean_loss(self) -> float:
        """What fits compare; the mean where the loss is the squared error."""
        return float(self.loss(self.of_pairs).mean())

    def figures(self) -> dict[str, float]:
        """Return the figures, ready for JSON."""
        return {name: getattr(self, name) for name in ("mean", "median", "p95", "mean_loss")}


def errors(problem: Problem, schedule: SolverSchedule) -> Errors:
    """Return how far a schedule ends from the reference; infinite where it leaves the finite numbers."""
    off = np.square(problem.final(schedule) - problem.reference).mean(axis=1)
    return Errors(np.where(np.isfinite(off), off, np.inf), problem.loss)


def check_loss(name: str) -> None:
    """Raise ValueError for an unknown name."""
    if name not in LOSSES:
        raise unknown("loss", name, list(LOSSES))


def loss_of(name: str, problem: Problem) -> Loss:
    """Return the loss of that name for a problem; ValueError where its converged samples are all the same."""
    check_loss(name)
    if name == "squared":
        return SQUARED
    variance = float(problem.reference.var(axis=0).mean())
    if not 0 < variance < np.inf:
        raise ValueError(
            f"loss='robust' measures errors by the variance of {len(problem.reference)} converged samples, "
            f"which is {variance:g}: give more prompts to fit to, or take loss='squared'"
        )
    return Loss(ROBUST_SHARE * variance)
