"""Pictures made ready for an image encoder, on tensors: differentiable, on any device, no PIL on the way.

Resizing is two matrix products with the weights that PIL's anti-aliased filters have, so the result follows
open_clip's own transform to within the rounding (and, near black and white, the clipping) of its 8-bit
intermediate pictures, and its gradient is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CLIP_MEAN", "CLIP_STD", "Preprocess", "resize"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = ("shortest", "longest", "squash")
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop or pad, and normalise, as open_clip's evaluation transform does.

    Args:
        size: height and width of the result. resize_mode: "shortest" resizes the shorter edge and crops,
        "longest" the longer one and pads with `fill_color` (0..255), "squash" ignores the proportions. clamp:
        keep resized pictures within [0, 1], as 8-bit pictures are. round_crop: where the middle lies between
        two pixels, crop as open_clip does (to the even one); else at the lower one, as transformers does.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    clamp: bool = True
    round_crop: bool = True

    def __post_init__(self) -> None:
        if self.resize_mode not in _MODES:
            raise ValueError(f"resize_mode is {self.resize_mode!r}: take one of {', '.join(_MODES)}")

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Preprocess:
        """The same from the `preprocess_cfg` of an open_clip model."""
        size = config["size"]
        return cls(
            size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            # open_clip takes bicubic for anything else too ("random" is for training)
            interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            resize_mode=config["resize_mode"],
            fill_color=config["fill_color"],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [0, 1] as [n, 3, *size] float32, normalised."""
        target = self._target(*images.shape[-2:])
        pixels = resize(images.float(), target, self.interpolation, clamp=self.clamp)
        pixels = _centred(pixels, self.size, self.fill_color / 255, rounded=self.round_crop)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _target(self, h: int, w: int) -> tuple[int, int]:
        """Height and width after resizing, before cropping or padding, with torchvision's rounding."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            short = self.size[0]
            return (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
        ratios = (h / self.size[0], w / self.size[1])
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(h / ratio), round(w / ratio)


def resize(
    images: Tensor, size: tuple[int, int], interpolation: str = "bicubic", *, clamp: bool = True
) -> Tensor:
    """Return pictures [n, c, h, w] at another size, filtered as PIL does, and kept within [0, 1]."""
    h, w = images.shape[-2:]
    if size[1] != w:
        images = images @ _matrix(w, size[1], interpolation).to(images).T
    if size[0] != h:
        images = _matrix(h, size[0], interpolation).to(images) @ images
    return images.clamp(0, 1) if clamp and size != (h, w) else images


@lru_cache(maxsize=64)
def _matrix(old: int, new: int, interpolation: str) -> Tensor:
    """Weights [new, old] of a resize along one axis; the filter widens with the step when shrinking."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = _cubic(distance.abs()) if interpolation == "bicubic" else (1 - distance.abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic filter with a = -1/2, at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < _SUPPORT["bicubic"], far, torch.zeros_like(x)))


def _centred(images: Tensor, size: tuple[int, int], fill: float, *, rounded: bool = True) -> Tensor:
    """Return the middle of the pictures, padded with `fill` where they are smaller than `size`."""
    h, w = images.shape[-2:]
    if h < size[0] or w < size[1]:
        short_h, short_w = max(size[0] - h, 0), max(size[1] - w, 0)
        pads = (short_w // 2, (short_w + 1) // 2, short_h // 2, (short_h + 1) // 2)
        images = F.pad(images, pads, value=fill)
        h, w = images.shape[-2:]
    top, left = ((h - size[0]) / 2, (w - size[1]) / 2)
    top, left = (round(top), round(left)) if rounded else (int(top), int(left))
    return images[..., top : top + size[0], left : left + size[1]]
