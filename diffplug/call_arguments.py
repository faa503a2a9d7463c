"""What a call of a pipeline asks for: steps, guidance, a grid of its own, prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from diffplug.intercept import original_class


def asked_guidance(pipe: Any, kwargs: Mapping[str, Any]) -> float | None:
    """The guidance of a call, or the pipeline's default for it; None where there is no such number.

    Pipelines whose guidance_scale is for distilled models alone (Qwen-Image) call it true_cfg_scale.
    """
    for name in ("guidance_scale", "true_cfg_scale"):
        value = asked(pipe, kwargs, name)
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    return None


def given_grid(kwargs: Mapping[str, Any]) -> Any:
    """The timesteps or sigmas that a call brings, None where the scheduler is to choose them."""
    grids = (kwargs.get(name) for name in ("timesteps", "sigmas"))
    return next((grid for grid in grids if grid is not None), None)


def asked_steps(pipe: Any, kwargs: Mapping[str, Any]) -> Any:
    """The number of steps of a call: of the grid that it brings, or the one asked for, or the default."""
    grid = given_grid(kwargs)
    return len(grid) if hasattr(grid, "__len__") else asked(pipe, kwargs, "num_inference_steps")


def asked(pipe: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """An argument of a call, or the pipeline's default for it."""
    if name in kwargs:
        return kwargs[name]
    parameter = inspect.signature(original_class(pipe).__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


_BATCHES = ("prompt", "prompt_embeds", "class_labels", "batch_size", "image", "video")


def count_prompts(kwargs: Mapping[str, Any]) -> int:
    """How many prompts (or labels, or input pictures) a pipeline call has, from its arguments by name."""
    for name in _BATCHES:
        given = kwargs.get(name)
        if isinstance(given, int):
            return given if name == "batch_size" else 1
        if isinstance(given, (list, tuple)):
            return len(given)
        if isinstance(given, torch.Tensor) and given.ndim > 0:
            return 1 if name == "image" and given.ndim == 3 else len(given)
        if given is not None:
            return 1
    return 1


def count_per_prompt(pipe: Any, kwargs: Mapping[str, Any]) -> int:
    """How many pictures (or videos) a pipeline makes for each prompt of a call."""
    parameters = inspect.signature(pipe.__call__).parameters
    for name in _PER_PROMPT:
        if name in parameters:
            given = kwargs.get(name)
            return int((parameters[name].default if given is None else given) or 1)
    return 1
