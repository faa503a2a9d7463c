"""Selection rules other than resampling: one survivor, the best one, the best few.

A rule is a function from log weights `[groups, k]` and generators to ancestors `[groups, k]`, as resampling
is. `one_survivor` gives every particle k W_i expected offspring, so it is an (extreme) resampling scheme and
the normaliser of a filter that uses it is unbiased: that filter is SVDD with its importance weights. The
others are marked `biased`: they maximise, and no weights belong to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffplug.steering.resampling import resample
from diffplug.steering.weights import as_log_weights

Rule = Callable[[Tensor, Sequence[torch.Generator]], Tensor]


def one_survivor(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return k times one ancestor, drawn with probability W_i (softmax selection; arXiv 2408.08252)."""
    return resample(logw, generators, "multinomial", n=1).expand_as(logw)


def the_best(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return k times the ancestor of the largest weight, the lowest slot of equals (greedy selection)."""
    return as_log_weights(logw).argmax(-1, keepdim=True).expand_as(logw)


def beam(width: int) -> Rule:
    """Return the rule that keeps the `width` best of k, k / width copies each; the best stands for dead."""

    def keep(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        logw = as_log_weights(logw)
        order = torch.argsort(logw, dim=-1, descending=True, stable=True)[..., :width]
        alive = logw.gather(-1, order) > -torch.inf
        order = torch.where(alive, order, order[..., :1])
        return order.repeat_interleave(logw.shape[-1] // width, -1)

    keep.biased = True  # type: ignore[attr-defined]
    return keep


the_best.biased = True  # type: ignore[attr-defined]


def kl_bound(candidates: int, selections: int) -> float:
    """Return the most nats by which greedy selection can move a law: selections * (log M - 1 + 1/M).

    By the chain rule each selection among M candidates adds at most the divergence of best-of-M.
    """
    m = torch.tensor(float(candidates), dtype=torch.float64)
    return selections * float(m.log() - 1 + 1 / m)
