"""How sharp a picture is, by the variance of its Laplacian."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffplug.rewards.networks import on_cpu

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class SharpnessReward:
    """Variance of the Laplacian of the brightness in 0..255, at least 0; larger is sharper (and noisier).

    Differentiable. Depends on the size of the picture: compare pictures of one size.
    """

    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64 of pictures [n, 3, h, w] in [0, 1], two pixels or more a side."""
        if min(images.shape[-2:]) < 2:
            raise ValueError(f"sharpness needs pictures of 2x2 pixels or more, got {tuple(images.shape)}")
        x = images.float()
        luma = (x * x.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True) * 255
        edges = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="reflect"), x.new_tensor(_LAPLACIAN)[None, None])
        return on_cpu((edges - edges.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3)))
