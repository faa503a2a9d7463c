"""Potentials: how strongly a particle's rewards so far pull at its weight.

A potential is a *cumulative* log potential psi of a lineage, a function of the rewards met on the way and of
the progress of the run. The weight of a particle is exp(psi - psi at its last resampling), and every
potential closes on strength * reward of the finished picture, so all of them target the same tilted law
(arXiv 2501.06848, section 3); they differ on the way. Here psi = rho * strength * statistic(path), with rho
by the tilt: the tempered difference is `Difference(tilt="rising")`.

Tempering says which share rho in [0, 1] of the full strength a scored call uses. A clean prediction at high
noise is a poor judge, so the tilt starts small and reaches the full strength with the finished picture.
Whatever rho does, the normaliser stays unbiased: the potential of a call cancels in the next weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.checks import check_number
from diffplug.steering.smc.weights import ess

TILTS = ("rising", "constant", "adaptive")


@dataclass(frozen=True)
class Adaptive:
    """Ask for as much tilt at every scored call as keeps the effective sample size.

    target_ess: share of the particles, in (0, 1]. Raises ValueError for anything else.
    """

    target_ess: float = 0.5

    def __post_init__(self) -> None:
        check_target(self.target_ess)


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


_GRID = 32
_HALVINGS = 40


def exponential(call: int, gamma: float) -> float:
    """Return min((1 + gamma)^call - 1, 1), the rising share of DAS (arXiv 2501.05803). Raises ValueError for
    gamma <= 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: the growth of the share must be above 0")
    return min((1.0 + gamma) ** call - 1.0, 1.0)


def check_target(target: float) -> None:
    """Raise ValueError unless the target is in (0, 1]."""
    check_number("target_ess", target)
    if not 0 < target <= 1:
        raise ValueError(f"target_ess={target}: give a share of the particles in (0, 1]")


def target_ess_share(full: Tensor, base: Tensor, start: Tensor, target: float) -> Tensor:
    """Return per group the share rho >= start up to which exp(rho * full - base) keeps its sample size.

    rho is the first crossing of ESS = target * k above `start`, to 2^-40 of the interval, and 1 where there
    is none. A group that is below the target at `start` already stays at `start`.

    full, base: `[groups, k]` log potential at full strength, and what was taken at the last selection. start:
    `[groups]` share of the call before. Dead particles (-inf in `full`) count as gone; a group that is all
    dead keeps `start`. Costs 32 + 40 evaluations of the ESS. Raises ValueError for a target outside (0, 1].
    """
    check_target(target)
    k = full.shape[-1]
    dead = full == -torch.inf
    empty = dead.all(-1)
    full = torch.where(empty[:, None], 0.0, full)

    def enough(share: Tensor) -> Tensor:
        scaled = torch.where(full == -torch.inf, -torch.inf, share[:, None] * full)
        living = k - (dead & ~empty[:, None]).sum(-1)  # the dead cannot be brought back by a smaller tilt
        return ess(scaled - base) >= target * living * (1 - 1e-12)

    low, high = start.clone(), torch.ones_like(start)
    crossed = ~enough(low)
    high = torch.where(crossed, low, high)
    for i in range(1, _GRID + 1):
        point = start + (1 - start) * i / _GRID
        good = enough(point)
        high = torch.where(~crossed & ~good, point, high)
        crossed = crossed | ~good
        low = torch.where(crossed, low, point)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(empty, start, low)
