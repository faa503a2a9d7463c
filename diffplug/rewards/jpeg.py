"""How small a picture becomes as a JPEG file: the compressibility of DDPO (arXiv 2305.13301)."""

from __future__ import annotations

import math
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


class JpegReward:
    """Minus the size in kilobytes (1000 bytes) as JPEG; larger is smoother, and `-jpeg` asks for detail.

    Not differentiable. Pictures of different sizes cannot be compared by it; broken ones (NaN) get NaN.

    Args:
        quality: of the JPEG, 1 to 95.
    """

    differentiable = False

    def __init__(self, *, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"JPEG quality is {quality}: take 1 to 95")
        self.quality = quality

    @classmethod
    def from_spec(cls, text: str) -> JpegReward:
        """From the quality."""
        if not text.strip().isdigit():
            raise ValueError(f"jpeg:{text}: expected a quality from 1 to 95, as in jpeg:90")
        return cls(quality=int(text))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64 of pictures [n, 3, h, w] in [0, 1]."""
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        sizes = [-self._kilobytes(Image.fromarray(array)) for array in pixels]
        scores = torch.tensor(sizes, dtype=torch.float64)
        # a broken picture would compress very well
        broken = ~images.detach().isfinite().flatten(1).all(1).cpu()
        return scores.masked_fill(broken, math.nan)

    def _kilobytes(self, picture: Image.Image) -> float:
        file = BytesIO()
        picture.save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000
