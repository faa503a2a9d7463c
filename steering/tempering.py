"""Tempering: which share rho in [0, 1] of the full strength a scored call uses.

A clean prediction at high noise is a poor judge, so the tilt starts small and reaches the full strength with
the finished picture. Whatever rho does, the normaliser stays unbiased: the potential of a call cancels in the
next weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffplug.steering.options import check_number
from diffplug.steering.weights import ess

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
