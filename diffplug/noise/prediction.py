"""From a network output to the clean prediction: x0hat = bound(keep * x + gain * output), per kind of output.

Mixes give the two numbers (keep, gain) in float64; bounds give the scheduler's own thresholding or clipping,
or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffplug.noise.noise_level import Level

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
Bound = Callable[[Tensor], Tensor]


def prediction_mix(kind: str, at: Level) -> tuple[float, float]:
    """Return (keep, gain) for a prediction ``kind`` at a level.

    A v_prediction is the velocity of the rescaled state x / sqrt(alpha^2 + sigma^2), so that one formula
    serves variance-preserving and variance-exploding states; flow_prediction means output = eps - x0.
    Raises ValueError for unknown kinds, and for epsilon at alpha = 0, which says nothing about x0.
    """
    if kind == "epsilon":
        if at.alpha == 0:
            raise ValueError(
                "epsilon prediction has no clean prediction at alpha = 0 (zero terminal SNR): "
                "use prediction_type='v_prediction' or a schedule that keeps some signal"
            )
        return 1.0 / at.alpha, -at.sigma / at.alpha
    if kind == "v_prediction":
        norm = math.hypot(at.alpha, at.sigma)
        return at.alpha / norm**2, -at.sigma / norm
    if kind in ("sample", "original_sample"):
        return 0.0, 1.0
    if kind == "flow_prediction":
        return 1.0 / (at.alpha + at.sigma), -at.sigma / (at.alpha + at.sigma)
    raise ValueError(f"prediction_type {kind!r} is unknown: allowed are {', '.join(PREDICTIONS)}")


def config_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return (keep, gain) for the scheduler's configured prediction_type (epsilon where it has none)."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "flow_prediction" and not scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type='flow_prediction' on a variance-preserving "
            "schedule: set use_flow_sigmas=True"
        )
    return prediction_mix(kind, at)


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Return whether a network is told 0.25 log sigma at any sigma, as SVD is, and no timestep."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def unbounded(scheduler: Any) -> Bound | None:
    """Return None: the family never clips."""
    return None


def config_bound(scheduler: Any) -> Bound | None:
    """Return thresholding, else clipping, as configured; None where neither is asked for."""
    config = scheduler.config
    if config.get("thresholding", False):
        ratio, top = config.dynamic_thresholding_ratio, config.sample_max_value
        return lambda x0: threshold(x0, ratio, top)
    reach = config.get("clip_sample_range", 1.0)
    return (lambda x0: x0.clamp(-reach, reach)) if config.get("clip_sample", False) else None


def threshold(x0: Tensor, ratio: float, top: float) -> Tensor:
    """Return ``x0`` clamped to the ``ratio`` quantile of its absolute values (1 to ``top``), divided by it.

    One quantile per sample over all its values (dynamic thresholding, arXiv 2205.11487). x0: [n, ...] float32
    or wider.
    """
    edge = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1.0, max(top, 1.0))
    edge = edge.view(-1, *(1,) * (x0.ndim - 1))
    return torch.clamp(x0, -edge, edge) / edge


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower, itself otherwise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def mean_channels(output: Tensor, sample: Tensor) -> Tensor:
    """Return the half of ``output`` that predicts the mean where a learned variance doubles the channels."""
    doubled = output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]
    return output[:, : sample.shape[1]] if doubled else output
