"""The loss of a preferred and a rejected path: -log sigmoid(beta (l_w - l_l)), with or without clipping.

l are log-ratios policy / reference, averaged over dimensions, which is the convention of every published
beta; a beta for sums over D dimensions is that divided by D. At the start, where policy and reference agree,
the loss is log 2 and its gradient that of REINFORCE with advantages of +- beta / 2.
Source: arXiv 2410.03190 (PSO), 2311.13231 (D3PO), 2406.04314 (SPO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Clip", "PairLoss", "Reduce", "check_clip", "clipped", "pair_loss", "soft_pair_loss"]

Clip = Literal["none", "two_sided", "ppo"]
Reduce = Literal["trajectory", "step"]


@dataclass(frozen=True)
class PairLoss:
    """errors: [m] with a graph; log: figures of the pairs."""

    errors: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)


def clipped(ell: Tensor, clip: Clip, epsilon: float, *, wins: bool) -> Tensor:
    """Return log-ratios whose ratio is held within 1 - epsilon ... 1 + epsilon.

    "two_sided" holds both sides, as the published code does; its gradient is zero outside, also where the
    policy moves the wrong way. "ppo" holds only what has moved far enough already: a winner above, a loser
    below.
    """
    low, high = math.log1p(-epsilon), math.log1p(epsilon)
    if clip == "two_sided":
        return ell.clamp(low, high)
    if clip == "ppo":
        return ell.clamp(max=high) if wins else ell.clamp(min=low)
    return ell


def check_clip(clip: Clip, epsilon: float, usual: float) -> None:
    """Raise ValueError for an epsilon that no ratio can keep to, or that would do nothing."""
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
    if clip == "none" and epsilon != usual:
        raise ValueError(f"epsilon={epsilon:g} would do nothing with clip='none': take 'ppo' or 'two_sided'")


def pair_loss(
    winner: Tensor,
    loser: Tensor,
    *,
    beta: float,
    reduce: Reduce = "trajectory",
    clip: Clip = "none",
    epsilon: float = 0.1,
) -> PairLoss:
    """Return the loss of m pairs from the log-ratios [m, N] of their steps.

    reduce: "trajectory" adds up the steps inside the sigmoid, "step" takes the mean of a loss for each.
    """
    better = clipped(winner, clip, epsilon, wins=True)
    worse = clipped(loser, clip, epsilon, wins=False)
    gap = better - worse
    logits = beta * (gap.sum(1, keepdim=True) if reduce == "trajectory" else gap)
    held = [(now != was).double().mean() for now, was in ((better, winner), (worse, loser))]
    log = {
        "accuracy": (logits.detach() > 0).double().mean(),
        "logit": logits.detach().mean(),
        "winner": winner.detach().mean(),
        "loser": loser.detach().mean(),
        "clipped": (held[0] + held[1]) / 2,
    }
    return PairLoss(-F.logsigmoid(logits).mean(1), log)


def soft_pair_loss(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy [m] of two scores with labels 1, 0 or 1/2, less its least value."""
    logit = first - second
    least = -(torch.xlogy(label, label) + torch.xlogy(1 - label, 1 - label))
    return -(label * F.logsigmoid(logit) + (1 - label) * F.logsigmoid(-logit)) - least
