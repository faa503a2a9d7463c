"""Guidance of a few-step model: what each pipeline must be told so that a picture costs the rows it should.

    pipelines                                          guidance runs when               off
    SD, SDXL, SD3, Sana, PixArt, Wan, LTX, CogVideoX   guidance_scale > 1               guidance_scale=0.0
    Z-Image, Krea 2                                    guidance_scale > 0               guidance_scale=0.0
    Qwen-Image                                         true_cfg_scale > 1, a negative   true_cfg_scale=1.0
    FLUX.1                                             true_cfg_scale > 1, a negative   true_cfg_scale=1.0
    FLUX.1, FLUX.2, HunyuanImage, LCM                  the scale is an input of the network

0.0 is off on both sides of the two thresholds, whichever version of Diffusers has which.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from diffplug.intercept import original_class, taken_arguments
from diffplug.samplers.few_step.catalogue import Row

_REAL = ("true_cfg_scale", "guidance_scale")
_EMBEDDED = ("distilled_guidance_scale", "guidance_scale")
_SECOND = ("true_cfg_scale", "guidance_scale_2", "audio_guidance_scale", "image_guidance_scale")
_NEGATIVE = "negative_prompt"


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call."""
    return inspect.signature(original_class(pipe).__call__).parameters


def guidance_call(row: Row, pipe: Any, scale: float | None = None) -> dict[str, float]:
    """Return the arguments that give a pipeline the guidance of a row, or real guidance of `scale`."""
    takes = parameters(pipe)
    real = next((name for name in _REAL if name in takes), None)
    embedded = next((name for name in _EMBEDDED if name in takes), None)
    if scale is not None and row.guidance != "embedded":
        return {real: scale} if real else {}
    if row.guidance == "off":
        return {} if real is None else {real: 1.0 if real == "true_cfg_scale" else 0.0}
    if row.guidance == "cfg" and real:
        return {real: float(row.guidance_scale or 0.0)}
    if row.guidance == "embedded" and embedded:
        return {embedded: float(scale if scale is not None else row.guidance_scale or 0.0)}
    return {}


def check_guidance(row: Row, pipe: Any, kwargs: Mapping[str, Any], wanted: Mapping[str, float]) -> None:
    """Raise ValueError for guidance that a row cannot take, and warn of a scale that it was not made for.

    wanted: what `guidance_call` gave. A value that means the same (0 or 1 where guidance is off) passes.
    """
    refuse_guidance(row, pipe, kwargs, wanted)
    for name, right in wanted.items():
        value = kwargs.get(name)
        low, high = row.guidance_range or (right, right)
        if row.guidance != "off" and value is not None and value != right and not low <= value <= high:
            span = f"{low:g} to {high:g}" if high > low else f"{right:g}"
            warnings.warn(f"{name}={value}: {row.name} was made for {span}", stacklevel=5)


def refuse_guidance(row: Row, pipe: Any, kwargs: Mapping[str, Any], wanted: Mapping[str, float]) -> None:
    """Raise ValueError for guidance that would run the network twice a step for a row that runs it once."""
    for name in _SECOND:
        value = kwargs.get(name)
        if row.rows == 1 and name not in wanted and isinstance(value, (int, float)) and value > 1:
            raise ValueError(
                f"{name}={value} would run {row.name} twice a step, which runs once: leave it out"
            )
    for name, right in wanted.items():
        value = kwargs.get(name)
        if row.guidance == "off" and value not in (None, right) and _runs(name, value, pipe):
            raise ValueError(
                f"{name}={value} would run {row.name} twice a step and guide what was distilled with "
                f"guidance already: leave it out, or insist with FewStep({row.name!r}, guidance={value})"
            )


def _runs(name: str, value: float, pipe: Any) -> bool:
    """Whether guidance of this value makes a second row: above 1, or above 0 where the pipeline says so."""
    threshold = 0.0 if original_class(pipe).__name__.startswith(("ZImage", "Krea2")) else 1.0
    return value > (1.0 if name == "true_cfg_scale" else threshold)


def check_negative(row: Row, pipe: Any, kwargs: Mapping[str, Any], scale: float | None) -> None:
    """Warn of a negative prompt that cannot act: without guidance the network never reads it."""
    if _NEGATIVE in taken_arguments(pipe):  # NegativeGuidance, NAG and SpeedUpNet see to it
        return
    given = [name for name in kwargs if name.startswith(_NEGATIVE) and _says_something(kwargs[name])]
    if given and not row.negative_prompt and not (scale is not None and row.guidance == "off"):
        warnings.warn(
            f"{given[0]} does nothing: {row.name} runs without guidance, so the network never reads it",
            stacklevel=5,
        )


def _says_something(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_says_something(item) for item in value)
    return value is not None and not (isinstance(value, str) and not value.strip())
