"""Picture files as RGB, a pipeline's pictures as one tensor, and their scores in portions that fit memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FIELDS = ("images", "frames", "videos")


def coloured(image: Any) -> Any:
    """Return a PIL image as RGB, as it is meant to be seen.

    Upright by its EXIF; 16 bits a pixel scaled to 8, which PIL would cut off at 255; what is transparent on
    white, where PIL would show the colour behind it.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    pixels = upright.convert("RGBA")
    white = Image.new("RGBA", pixels.size, "white")
    return Image.alpha_composite(white, pixels).convert("RGB")


def raw_pictures(output: Any) -> Any:
    """Return the pictures of a pipeline's output as it holds them. Raises ValueError where it has none."""
    if isinstance(output, tuple):
        return output[0]
    for name in _FIELDS:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise ValueError(
        f"{type(output).__name__} holds no {' or '.join(_FIELDS)}: this pipeline cannot be steered"
    )


def to_tensor(pictures: Any) -> Tensor:
    """Return pictures in [0, 1] as `[n, 3, h, w]` float32, clips as `[n, f, 3, h, w]`.

    From PIL images, arrays `[..., h, w, c]` or tensors `[..., c, h, w]`, and lists of such clips. Sequences
    of integer tokens `[n, l]` stay as they are.
    """
    if isinstance(pictures, Tensor) and not pictures.is_floating_point():
        return pictures.detach().to("cpu")
    if isinstance(pictures, Tensor):
        return _coloured(pictures.detach().to("cpu", torch.float32))
    if isinstance(pictures, (list, tuple)):
        if isinstance(pictures[0], (list, tuple, np.ndarray, Tensor)):
            return torch.stack([to_tensor(clip) for clip in pictures])
        pictures = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in pictures])
    return _coloured(torch.from_numpy(np.asarray(pictures, dtype=np.float32)).movedim(-1, -3))


def _coloured(images: Tensor) -> Tensor:
    """Return grey pictures with three equal channels, others as they are."""
    return images.repeat_interleave(3, dim=-3) if images.shape[-3] == 1 else images


def score_pictures(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str], *, takes_video: bool
) -> Tensor:
    """Return `[n]` scores; a clip gets the mean over its frames unless the reward takes clips.

    All rows at once; when memory runs out, half as many at a time, down to one.
    """
    if images.ndim != 5 or takes_video:
        return _in_portions(score, images, prompts)
    clips, frames = images.shape[:2]
    repeated = [prompt for prompt in prompts for _ in range(frames)]
    return _in_portions(score, images.flatten(0, 1), repeated).reshape(clips, frames).mean(-1)


def _in_portions(score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> Tensor:
    done: list[Tensor] = []
    start, size = 0, len(images)
    while start < len(images):
        try:
            done.append(score(images[start : start + size], prompts[start : start + size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            continue
        start += size
    return done[0] if len(done) == 1 else torch.cat(done)
