"""A number and a category that are diffused together, with an exact denoiser: the truth for mixed states.

Data: c in {0, 1, 2} with chances p, x given c from N(m_c, v). Both follow one cosine schedule; the category
ends at its prior p, the number at N(0, 1). A jump back draws both parts, each given the state, so the chain's
own law differs from the data: what counts is its tilt, which free runs estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20
CHANCES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
VARIANCE = 0.25
STRENGTH = 2.0


@dataclass(frozen=True)
class Mixed:
    """States: numbers x `[n]` float64 and categories c `[n]`."""

    x: Tensor
    c: Tensor


@dataclass(frozen=True)
class Clean:
    """The exact clean prediction: the mean of x `[n]` and the chances of c `[n, 3]`."""

    x: Tensor
    chances: Tensor


def signal(t: int) -> float:
    """Return abar of the cosine schedule (arXiv 2102.09672, equation 17) at t in 0..20."""
    return (
        math.cos((t / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )


def start(normal: Tensor, uniform: Tensor) -> Mixed:
    """Return pure noise."""
    return Mixed(normal.double(), _drawn(CHANCES.expand(len(normal), 3), uniform))


def denoised(state: Mixed, t: int) -> Clean:
    """Return E[x0 | state] and P(c0 | state) exactly."""
    a = signal(t)
    total = a * VARIANCE + 1 - a
    off = state.x[:, None] - math.sqrt(a) * MEANS
    kept = a * torch.nn.functional.one_hot(state.c, 3) + (1 - a) * CHANCES[state.c][:, None]
    chances = torch.softmax(CHANCES.log() + kept.log() - off.square() / (2 * total), -1)
    means = MEANS + math.sqrt(a) * VARIANCE / total * off
    return Clean((chances * means).sum(-1), chances)


def step(state: Mixed, clean: Clean, t: int, normal: Tensor, uniform: Tensor) -> Mixed:
    """Return the state at t - 1, both parts drawn."""
    now, before = signal(t), signal(t - 1)
    alpha = now / before
    to_clean, to_now = (
        math.sqrt(before) * (1 - alpha) / (1 - now),
        math.sqrt(alpha) * (1 - before) / (1 - now),
    )
    width = math.sqrt((1 - before) / (1 - now) * (1 - alpha))
    x = to_clean * clean.x + to_now * state.x + width * normal.double()
    likelihood = alpha * torch.nn.functional.one_hot(state.c, 3) + (1 - alpha) * CHANCES[state.c][:, None]
    joint = likelihood[:, None, :] * (before * torch.eye(3) + (1 - before) * CHANCES)  # [n, c0, j]
    chances = (clean.chances[:, :, None] * joint / joint.sum(-1, keepdim=True)).sum(1)
    return Mixed(x, _drawn(chances, uniform))


def reward(x: Tensor, c: Tensor) -> Tensor:
    """Return 1[c = 2] - |x - 1| / 2."""
    return (c == 2).double() - (x - 1).abs() / 2


def _drawn(chances: Tensor, uniform: Tensor) -> Tensor:
    return (uniform.double()[:, None] >= chances.cumsum(-1)[:, :2]).sum(-1)
