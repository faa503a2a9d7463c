"""Potentials: how strongly a particle's rewards so far pull at its weight.

A potential is a *cumulative* log potential psi of a lineage, a function of the rewards met on the way and of
the progress of the run. The weight of a particle is exp(psi - psi at its last resampling), and every
potential closes on strength * reward of the finished picture, so all of them target the same tilted law
(arXiv 2501.06848, section 3); they differ on the way. Here psi = rho * strength * statistic(path), with rho
by the tilt: the tempered difference is `Difference(tilt="rising")`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.steering.options import check_number
from diffplug.steering.tempering import check_target, target_ess_share

TILTS = ("rising", "constant", "adaptive")


@dataclass(frozen=True, kw_only=True)
class Potential:
    """Base of the potentials; a subclass says which statistic of the rewards so far it takes.

    strength: lambda of exp(lambda r), >= 0. tilt: "rising" takes rho = progress of the run in (0, 1], because
    a clean prediction at high noise is a poor judge; "constant" takes rho = 1 throughout; "adaptive" takes
    the largest rho, never falling, that keeps the effective sample size at `target_ess` of the particles.
    """

    strength: float
    tilt: str = "rising"
    target_ess: float = 0.5

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength={self.strength}: it must be a finite number >= 0 (0 switches steering off)"
            )
        if self.tilt not in TILTS:
            raise ValueError(f"unknown tilt {self.tilt!r}: choose one of {', '.join(TILTS)}")
        check_target(self.target_ess)

    def statistic(self, path: Tensor) -> Tensor:
        """Return the statistic `[groups, k]` of rewards `path: [calls, groups, k]`; NaN = was not scored."""
        raise NotImplementedError

    def full(self, path: Tensor) -> Tensor:
        """Return strength * statistic, `[groups, k]`; the dead (latest reward -inf) have -inf."""
        return torch.where(path[-1] == -torch.inf, -torch.inf, _scaled(self.strength, self.statistic(path)))

    def share(self, full: Tensor, base: Tensor, before: Tensor, progress: float) -> Tensor:
        """Return rho of each group, `[groups]`. before: the rho of the call before; base: see the filter."""
        if self.tilt == "adaptive":
            return target_ess_share(full, base, before, self.target_ess)
        return torch.full_like(before, progress if self.tilt == "rising" else 1.0)

    def final(self, rewards: Tensor) -> Tensor:
        """Return strength * reward of the finished pictures, `[groups, k]`."""
        return _scaled(self.strength, rewards)


@dataclass(frozen=True, kw_only=True)
class Difference(Potential):
    """The latest reward: improvement since the last resampling counts."""

    def statistic(self, path: Tensor) -> Tensor:
        """Return r_i."""
        return path[-1]


@dataclass(frozen=True, kw_only=True)
class MaxIncrement(Potential):
    """The best reward so far: a particle keeps the credit of its best moment until the end."""

    def statistic(self, path: Tensor) -> Tensor:
        """Return max_{l <= i} r_l."""
        return _running_max(path)[-1]


@dataclass(frozen=True, kw_only=True)
class Max(Potential):
    """The sum over scored calls of the best reward so far (the paper's max potential)."""

    def statistic(self, path: Tensor) -> Tensor:
        """Return sum_{j <= i} max_{l <= j} r_l."""
        return _running_max(path).where(~torch.isnan(path), 0.0).sum(0)


@dataclass(frozen=True, kw_only=True)
class Sum(Potential):
    """The sum over scored calls of the sum of rewards so far (the paper's sum potential); very aggressive."""

    def statistic(self, path: Tensor) -> Tensor:
        """Return sum_{j <= i} sum_{l <= j} r_l."""
        return path.nan_to_num(nan=0.0, neginf=-torch.inf).cumsum(0).where(~torch.isnan(path), 0.0).sum(0)


POTENTIALS: dict[str, type[Potential]] = {
    "difference": Difference,
    "max": Max,
    "sum": Sum,
    "max-increment": MaxIncrement,
}


def potential(name: str, **options: object) -> Potential:
    """Return the potential of that name. Raises ValueError for an unknown one, and for bad options."""
    if name not in POTENTIALS:
        raise ValueError(f"unknown potential {name!r}: choose one of {', '.join(POTENTIALS)}")
    return POTENTIALS[name](**options)  # type: ignore[arg-type]


def _running_max(path: Tensor) -> Tensor:
    return path.nan_to_num(nan=-torch.inf, neginf=-torch.inf).cummax(0).values


def _scaled(factor: float, rewards: Tensor) -> Tensor:
    """Return factor * rewards, where -inf stays -inf even for a factor of 0."""
    return torch.where(rewards == -torch.inf, -torch.inf, factor * rewards)
