"""Dynamic compensation: replace the newest model output by what past outputs give at a shifted time.

DC-Solver (arXiv 2409.03755): a predictor-corrector sampler corrects its sample after evaluating the
network, but keeps the output of the uncorrected one. A ratio rho per step moves that output along the
Lagrange polynomial through the last K + 1 outputs, from the newest node (rho = 1: nothing changes) to
node[i-1] + rho * (node[i] - node[i-1]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def lagrange_weights(nodes: Sequence[float], target: float) -> tuple[float, ...]:
    """Weights l: f(target) = sum_k l[k] f(nodes[k]) for every polynomial f of degree < len(nodes).

    They sum to 1. All float64. Raises ZeroDivisionError when two nodes are equal.
    """
    return tuple(
        math.prod((target - other) / (node - other) for j, other in enumerate(nodes) if j != k)
        for k, node in enumerate(nodes)
    )


def compensation_weights(
    nodes: Sequence[float], ratios: Sequence[float], order: int
) -> dict[int, tuple[float, ...]]:
    """{i: weights of outputs i, i-1, ..., i-order} for every step i whose ratio is not 1.

    nodes: the interpolation variable at every step, one per ratio (timesteps, or log signal-to-noise ratios).
    Raises ValueError when a step that compensates has two equal nodes. Source: arXiv 2409.03755, section 3.2.
    """
    table = {}
    for i in range(order, len(ratios)):
        if ratios[i] == 1.0:
            continue
        window = [nodes[i - k] for k in range(order + 1)]
        if len(set(window)) < len(window):
            raise ValueError(
                f"DC ratio {ratios[i]} of step {i} needs {order + 1} different times, got {window}: "
                f"use dc_variable='lambda', a lower dc_order, or another grid"
            )
        table[i] = lagrange_weights(window, window[1] + ratios[i] * (window[0] - window[1]))
    return table


def compensate(outputs: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of `outputs`, added up in float32 or wider and returned in the first one's dtype."""
    dtype = outputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = outputs[0].to(wide) * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output.to(wide) * weight
    return total.to(dtype)
