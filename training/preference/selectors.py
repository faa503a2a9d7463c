"""From scores to what is trained on: pairs with a winner, or advantages within a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pairs", "all_pairs", "best_worst", "group_advantage", "score_gap", "step_best_worst"]


@dataclass(frozen=True)
class Pairs:
    """Who wins: row [m], and the numbers of winner and loser among its candidates [m]."""

    row: Tensor
    winner: Tensor
    loser: Tensor

    def __len__(self) -> int:
        return len(self.row)


def best_worst(scores: Tensor, min_gap: float = 0.0) -> Pairs:
    """Return the best and the worst of each row of scores [n, K]; a gap of `min_gap` or less is a tie.

    Ties are left out: they would train on noise alone.
    """
    _at_least_two(scores)
    best, worst = scores.max(1), scores.min(1)
    row = (best.values - worst.values > min_gap).nonzero()[:, 0]
    return Pairs(row, best.indices[row], worst.indices[row])


def all_pairs(scores: Tensor, min_gap: float = 0.0) -> Pairs:
    """Return every pair of candidates of a row whose scores [n, K] differ by more than `min_gap`."""
    _at_least_two(scores)
    row, winner, loser = (scores[:, :, None] - scores[:, None, :] > min_gap).nonzero(as_tuple=True)
    return Pairs(row, winner, loser)


def step_best_worst(scores: Tensor, threshold: float) -> Pairs:
    """Return best and worst where the soft-maxed gap p_best - p_worst exceeds `threshold` (arXiv 2406.04314).

    The softmax is over the two alone, so the number of candidates does not enter; scores are in units of a
    preference model's logits. Equal scores are never taken.
    """
    return best_worst(scores, score_gap(threshold))


def score_gap(threshold: float) -> float:
    """Return the difference of scores that a soft-maxed gap of `threshold` stands for: 2 atanh(threshold)."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}")
    return math.log((1 + threshold) / (1 - threshold))


def group_advantage(scores: Tensor, clip: float = 5.0, scale: bool = True) -> Tensor:
    """Return the advantages [n, K] of candidates over the mean of their row, in its standard deviations.

    clip: the largest absolute advantage. scale: False leaves the reward's units. A row of equal scores has no
    advantage at all.
    """
    _at_least_two(scores)
    gap = scores - scores.mean(1, keepdim=True)
    if scale:
        spread = scores.std(1, keepdim=True)
        gap = torch.where(spread > 1e-12, gap / spread.clamp(min=1e-12), torch.zeros_like(gap))
    return gap.clamp(-clip, clip)


def _at_least_two(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"a comparison needs two candidates or more a prompt, got scores {tuple(scores.shape)}"
        )
