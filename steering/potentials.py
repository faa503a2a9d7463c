"""Potentials: how strongly a particle's rewards so far pull at its weight.

A potential is a *cumulative* log potential psi of a lineage, a function of the rewards met on the way and of
the progress of the run. The weight of a particle is exp(psi - psi at its last resampling), and every
potential closes on strength * reward of the finished picture, so all of them target the same tilted law
(arXiv 2501.06848, section 3); they differ on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TILTS = ("rising", "constant")


class Potential(Protocol):
    """What the particle filter asks of a potential."""

    def psi(self, path: Tensor, progress: float) -> Tensor:
        """Return the log potential `[groups, k]` after the last reward of `path: [calls, groups, k]`."""
        ...

    def final(self, rewards: Tensor) -> Tensor:
        """Return strength * reward of the finished pictures, `[groups, k]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference potential: psi = strength * rho * r, which rewards improvement since the last resampling.

    strength: lambda of exp(lambda r), >= 0. tilt: "rising" takes rho = progress of the run in (0, 1], because
    a clean prediction at high noise is a poor judge; "constant" takes rho = 1 throughout.
    """

    strength: float
    tilt: str = "rising"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength={self.strength}: it must be a finite number >= 0 (0 switches steering off)"
            )
        if self.tilt not in TILTS:
            raise ValueError(f"unknown tilt {self.tilt!r}: choose one of {', '.join(TILTS)}")

    def psi(self, path: Tensor, progress: float) -> Tensor:
        """Return strength * rho * (latest reward), `[groups, k]`."""
        rho = progress if self.tilt == "rising" else 1.0
        return _scaled(self.strength * rho, path[-1])

    def final(self, rewards: Tensor) -> Tensor:
        """Return strength * reward, `[groups, k]`."""
        return _scaled(self.strength, rewards)


def _scaled(factor: float, rewards: Tensor) -> Tensor:
    """Return factor * rewards, where -inf stays -inf even for a factor of 0."""
    return torch.where(rewards == -torch.inf, -torch.inf, factor * rewards)
