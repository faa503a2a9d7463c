"""Custom grids: timesteps or sigmas that a person gives become the nodes of a solver, unchanged.

VP models count noise as sigma / alpha (the number that Diffusers' UniPC keeps), flow models as sigma in (0,
1]. A grid holds the N nodes where the network is evaluated; the terminal node is the scheduler's business.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from diffplug.samplers.model_noise import FloatArray


def check_request(num_inference_steps: Any, timesteps: Any, sigmas: Any) -> None:
    """Raise ValueError unless set_timesteps got a number of steps or one grid."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("set_timesteps got timesteps and sigmas: give one of the two")
    if num_inference_steps is None:
        if timesteps is None and sigmas is None:
            raise ValueError("set_timesteps got nothing: give num_inference_steps, timesteps or sigmas")
    elif (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, Integral)
        or num_inference_steps < 1
    ):
        raise ValueError(f"num_inference_steps={num_inference_steps!r}: give a whole number of at least 1")


def check_length(num_inference_steps: int | None, nodes: int) -> None:
    """Raise ValueError when a number of steps came with a grid of another length."""
    if num_inference_steps is not None and num_inference_steps != nodes:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}, but the given grid has {nodes} nodes: leave one out"
        )


def checked_levels(name: str, values: Any, *, lowest: float, highest: float = np.inf) -> FloatArray:
    """The values as a float64 array [N]; `lowest` itself is allowed for timesteps only (they may be 0).

    values: list, tuple, array or tensor. Raises ValueError unless they are finite, in range and strictly
    decreasing (still so after rounding to float32, which is what schedulers store).
    """
    raw = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    try:
        levels = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are not numbers ({error}): give a list of numbers, largest first") from None
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(f"{name} have shape {levels.shape}: give a flat list with one number per step")
    if not np.isfinite(levels).all():
        raise ValueError(f"{name} hold a value that is not finite: {levels.tolist()}")
    low_ok = levels >= lowest if name == "timesteps" else levels > lowest
    if not (low_ok & (levels <= highest)).all():
        hint = "; leave out the final 0, final_sigmas_type sets the end" if levels[-1] == 0 else ""
        raise ValueError(
            f"{name} have to lie between {lowest:g} and {highest:g}, got {levels.tolist()}{hint}"
        )
    if not (np.diff(levels.astype(np.float32)) < 0).all():
        raise ValueError(f"{name} have to decrease strictly, largest first, got {levels.tolist()}")
    return levels


def is_pipeline_default(sigmas: FloatArray) -> bool:
    """Whether these are 1, 1 - 1/N, ..., 1/N: what flow pipelines send when the person gave no sigmas.

    Those are meant to be shifted by the scheduler; every other grid is used as it is.
    """
    return bool(np.allclose(sigmas, np.linspace(1.0, 1.0 / len(sigmas), len(sigmas)), rtol=0, atol=1e-6))
