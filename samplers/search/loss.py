"""What a search makes small: the squared errors of pairs as they are, or without those beyond hope.

With few evaluations and much guidance some pairs end in another picture than the converged one, whatever the
solver does. Their errors are as large as pictures differ, and a mean of squares is mostly theirs: what lowers
it is to blur. A loss that grows with the logarithm there leaves the fit to the pairs that can be had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffplug.registry import unknown

if TYPE_CHECKING:
    from diffplug.samplers.search.problem import Problem

__all__ = ["LOSSES", "SQUARED", "Loss", "check_loss", "loss_of"]

Floats = npt.NDArray[np.float64]
LOSSES = ("squared", "robust")
ROBUST_SHARE = 0.1  # of the variance of converged samples: errors above it count less and less


@dataclass(frozen=True)
class Loss:
    """Of squared errors, each the mean over a pair's numbers. scale: None counts them as they are; else
    Cauchy's loss, scale * log(1 + error / scale): nearly the error below the scale, its logarithm above.
    """

    scale: float | None = None

    def __call__(self, of_pairs: Floats) -> Floats:
        """The losses [n] of squared errors [n]; an infinite one stays infinite."""
        return of_pairs if self.scale is None else self.scale * np.log1p(of_pairs / self.scale)

    def residuals(self, off: Floats) -> Floats:
        """For least squares: numbers whose squares sum up to the mean loss of differences [n, d]."""
        if self.scale is not None:
            of_pairs = np.square(off).mean(axis=1, keepdims=True)
            off = off * np.sqrt(self(of_pairs) / np.maximum(of_pairs, np.finfo(np.float64).tiny))
        return off.ravel() / np.sqrt(off.size)


SQUARED = Loss()


def check_loss(name: str) -> None:
    """Raise ValueError for an unknown name."""
    if name not in LOSSES:
        raise unknown("loss", name, list(LOSSES))


def loss_of(name: str, problem: Problem) -> Loss:
    """The loss of that name for a problem's converged samples; ValueError where these are all the same."""
    check_loss(name)
    if name == "squared":
        return SQUARED
    truth = problem.truth
    variance = float(truth.var(axis=0).mean())
    if not 0 < variance < np.inf:
        raise ValueError(
            f"loss='robust' measures errors by the variance of {len(truth)} converged samples, which is "
            f"{variance:g}: give more prompts to fit to, or take loss='squared'"
        )
    return Loss(ROBUST_SHARE * variance)
