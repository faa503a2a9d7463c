"""Dynamic compensation: replace the newest model output by what past outputs give at a shifted time.

DC-Solver (arXiv 2409.03755): a predictor-corrector sampler corrects its sample after evaluating the
network, but keeps the output of the uncorrected one. A ratio rho per step moves that output along the
Lagrange polynomial through the last K + 1 outputs, from the newest node (rho = 1: nothing changes) to
node[i-1] + rho * (node[i] - node[i-1]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from diffplug.samplers.decisions import LARGEST_RATIO

MAX_DC_ORDER = 3


def checked_ratios(ratios: Any, order: int) -> list[float] | None:
    """Ratios as a list of floats, one per step; None stays None.

    ratios: any sequence or array of numbers up to 10. order: K; a compensation needs K + 1 outputs, so the
    first K ratios can do nothing and have to be 1. Raises ValueError otherwise.
    """
    if ratios is None:
        return None
    values = ratios.tolist() if hasattr(ratios, "tolist") else ratios
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(
            f"DC ratios are a {type(ratios).__name__}: give a list with one number per step, or None"
        )
    if not values:
        raise ValueError("DC ratios are an empty list: give one number per step, or None for no compensation")
    for step, ratio in enumerate(values):
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or not math.isfinite(ratio):
            raise ValueError(
                f"DC ratio {ratio!r} of step {step} is not a finite number: 1.0 means no compensation"
            )
        if abs(float(ratio)) > LARGEST_RATIO:
            raise ValueError(
                f"DC ratio {float(ratio):g} of step {step} extrapolates too far: allowed are up to "
                f"{LARGEST_RATIO:g}, searches stay in 0.3 to 2"
            )
        if step < order and ratio != 1:
            raise ValueError(
                f"DC ratio {float(ratio)} of step {step} can do nothing: with dc_order={order} a step needs "
                f"{order + 1} outputs, so the first {order} ratios have to be 1.0"
            )
    return [float(ratio) for ratio in values]


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


def check_step_count(ratios: Sequence[float], steps: int) -> None:
    """Raise ValueError unless there is one ratio per step."""
    if len(ratios) != steps:
        raise ValueError(
            f"DC ratios are for {len(ratios)} steps, the pipeline asked for {steps}: "
            f"run {len(ratios)} steps, search ratios for {steps}, or set dc_ratios=None"
        )
