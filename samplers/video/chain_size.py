"""Which size a picture has to have so that the video made from it is not stretched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffplug.call_arguments import asked
from diffplug.intercept import original_class

__all__ = ["multiple_of", "picture_size", "trimmed"]

_SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)


def multiple_of(pipe: Any) -> int:
    """Return the number of pixels that a pipeline's height and width are multiples of."""
    found = (getattr(pipe, name, None) for name in _SPATIAL)
    scale = next((int(ratio) for ratio in found if isinstance(ratio, int)), 8)
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    patch = config.get("patch_size", 1)
    return scale * int(patch[-1] if isinstance(patch, (list, tuple)) else patch)


def picture_size(
    t2i: Any, i2v: Any, call: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Return the video's call with sizes that fit, and (height, width) of the picture; None where the models
    have one size each, which is the same.

    Heights and widths that are no multiples of what the video model works in are rounded down, as its own
    pipeline does. Raises ValueError for one of the two without the other.
    """
    told = {name: asked(i2v, call, name) for name in ("height", "width")}
    given = [name for name in told if call.get(name) is not None]
    if len(given) == 1:
        raise ValueError(f"{given[0]}={call[given[0]]} was given alone: give height and width together")
    if not all(isinstance(side, int) for side in told.values()):
        return dict(call), None
    step = multiple_of(i2v)
    for name, side in told.items():
        if side < step:
            raise ValueError(f"{name}={side}: this video model works in multiples of {step} pixels")
    height, width = (side // step * step for side in told.values())
    takes = inspect.signature(original_class(t2i).__call__).parameters
    if not {"height", "width"} <= takes.keys():
        return {**call, "height": height, "width": width}, None
    return {**call, "height": height, "width": width}, (height, width)


def trimmed(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of a picture [3, h, w] that is a little larger than (height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(picture.shape[-2:], size, strict=True))
    return picture[:, top : top + size[0], left : left + size[1]].contiguous()
