"""How near a picture is to a colour, on average over its pixels."""

from __future__ import annotations

import math

import torch
from PIL import ImageColor
from torch import Tensor

from diffplug.registry import unknown
from diffplug.rewards.networks import on_cpu


class ColourReward:
    """Minus the mean distance of the pixels to a colour, from -1 (black for white) to 0 (all of that colour).

    Differentiable. Distances are in RGB, divided by that of black and white.

    Args:
        colour: a name that CSS knows ("red", "navy") or "#rgb" or "#rrggbb".
    """

    differentiable = True

    def __init__(self, colour: str = "red") -> None:
        self.colour = colour
        self.rgb = rgb_of(colour)

    @classmethod
    def from_spec(cls, text: str) -> ColourReward:
        """From the colour."""
        return cls(text)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64 of pictures [n, 3, h, w] in [0, 1]."""
        wanted = torch.tensor(self.rgb, device=images.device)[:, None, None]
        distance = torch.linalg.vector_norm(images.float() - wanted, dim=1)
        return on_cpu(-distance.mean((1, 2)) / math.sqrt(3))


def rgb_of(colour: str) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of a colour's name or hexadecimal number; ValueError for others."""
    text = colour.strip().lower()
    names = sorted(ImageColor.colormap)
    if text not in names and not (text.startswith("#") and len(text) in (4, 7)):
        raise unknown("colour", colour, names, "Or write #rrggbb.")
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ValueError(
            f"colour {colour!r} is no hexadecimal number: write #rrggbb, as in #ff8000"
        ) from error
    return red / 255, green / 255, blue / 255
