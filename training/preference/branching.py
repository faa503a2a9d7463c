"""Candidates that share their past: K from one state, judged a few steps later, one of them goes on.

    x_i --> K candidates --> ... j steps ... --> scores --> pairs; a random candidate goes on

Candidates of one state differ in detail alone, so that a judge of whole pictures judges detail (SPO, arXiv
2406.04314). Which candidate goes on is drawn uniformly and never looks at the scores: to go on from winners,
or from losers, trains the model on states that it will not meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.preference.kernel import Kernel

__all__ = ["Segment", "branch"]

Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
Judge = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Segment:
    """first: the step that branches. states: [n, K, j + 1, ...], equal for all K at 0. scores: [n, K]
    float64. scored: the step whose x0hat was judged, N for the picture itself. chosen: [n], who goes on."""

    first: int
    states: Tensor
    scores: Tensor
    scored: int
    chosen: Tensor

    @property
    def length(self) -> int:
        """j: the transitions of each chain."""
        return self.states.shape[2] - 1


@torch.no_grad()
def branch(
    kernel: Kernel,
    predict: Predict,
    judge: Judge,
    conditions: Conditions,
    x: Tensor,
    z: Tensor,
    picks: Tensor,
    *,
    first: int,
    length: int = 1,
) -> list[Segment]:
    """Return the segments of n prompts.

    predict: x0hat of (states, steps, conditions). judge: scores [n * K] of (clean predictions, step), where
    step N means pictures. x: [n, ...] standard normal; z: [n, K, N, ...] noise of the steps; picks: [n, N]
    uniform numbers that choose who goes on. first: where branching begins, i_0. length: j, steps of a chain
    before it is judged. Costs first + 1 evaluations a prompt, and K for each step after.
    """
    n, k, last = len(x), z.shape[1], len(kernel)
    x, many = x * kernel.start, _repeated(conditions, n, k)
    for i in range(first):
        x = kernel.sample(x, predict(x, _at(i, n), conditions), _at(i, n), z[:, 0, i])
    x0 = predict(x, _at(first, n), conditions)
    found: list[Segment] = []
    i = first
    while i < last and kernel.stochastic(i):
        end = min(i + length, last)
        chain = [x.repeat_interleave(k, 0)]
        said = x0.repeat_interleave(k, 0)
        for j in range(i, end):
            if j > i:
                said = predict(chain[-1], _at(j, n * k), many)
            chain.append(kernel.sample(chain[-1], said, _at(j, n * k), z[:, :, j].flatten(0, 1)))
        clean = predict(chain[-1], _at(end, n * k), many) if end < last else chain[-1]
        scores = judge(clean, end).view(n, k)
        chosen = (picks[:, i] * k).long().clamp(max=k - 1)
        states = torch.stack(chain, dim=1).view(n, k, end - i + 1, *x.shape[1:])
        found.append(Segment(i, states, scores, end, chosen))
        row = torch.arange(n)
        x, x0 = states[row, chosen, -1], clean.view(n, k, *x.shape[1:])[row, chosen]
        i = end
    return found


def _at(step: int, n: int) -> Tensor:
    return torch.full((n,), step)


def _repeated(conditions: Conditions, n: int, k: int) -> Conditions:
    return conditions[torch.arange(n).repeat_interleave(k)]
