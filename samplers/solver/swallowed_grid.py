"""Grids that a pipeline does not hand on to its scheduler: given to it past the pipeline, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffplug.call_arguments import asked
from diffplug.scheduler.pipeline_quirks import lost_arguments

__all__ = ["handed_over"]


def handed_over(pipe: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The arguments of a call, and the sigmas that its pipeline would lose, None where it loses none.

    Where such a pipeline is given no grid, these are its own, 1, ..., 1/N, which it makes and drops as well.
    Raises ValueError for timesteps that it would lose.
    """
    lost = lost_arguments(pipe)
    if "timesteps" in lost and kwargs.get("timesteps") is not None:
        raise ValueError(
            f"timesteps of {type(pipe).__name__} {lost['timesteps']}: leave it out, or give sigmas="
        )
    if "sigmas" not in lost or kwargs.get("timesteps") is not None:
        return kwargs, None
    sigmas = kwargs.get("sigmas")
    if sigmas is not None:
        return {**kwargs, "sigmas": None, "num_inference_steps": len(sigmas)}, sigmas
    steps = asked(pipe, kwargs, "num_inference_steps")
    dropped = "use_flow_sigmas" in lost["sigmas"]  # it makes a grid of its own, and drops that as well
    if not dropped or not isinstance(steps, int) or steps < 1:
        return kwargs, None
    return kwargs, np.linspace(1.0, 1.0 / steps, steps)
