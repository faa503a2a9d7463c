"""The network of Moving Shapes: Wan's transformer at a thousandth of the size, over Shapes' own latents.

It reads 9 channels a frame: the noisy latent, the clean latent of the frame or of the last one that is known
(zeros where none is), and a mask that says which are. So one network makes videos from a prompt (nothing
known), from a picture (frame 0 known) and from the last frames of another clip.

It predicts the clean latents, and the pipeline makes a velocity of them: a token has 64 numbers of noise,
which a network 128 wide had better not carry to its end.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

__all__ = [
    "LATENT_CHANNELS",
    "LONG_FRAMES",
    "PREFIX_FRAMES",
    "WINDOW_FRAMES",
    "normalised",
    "plain",
    "scheduler",
    "shown_latents",
    "transformer",
    "velocity",
]

LATENT_CHANNELS = 4
WINDOW_FRAMES = 16
"""Frames of an ordinary clip."""
LONG_FRAMES = 97
"""Frames of the longest clips that the network has been shown."""
PREFIX_FRAMES = (1, 4)
"""Numbers of first frames that it has been trained to continue."""

LATENT_MEAN = (-0.44, -0.52, 0.03, 0.34)
LATENT_STD = (0.63, 0.78, 1.57, 0.47)
"""Mean and deviation of each channel of the scaled latents; the network sees unit variance."""

_SHIFT = 4.0


def shown_latents(latents: Tensor, counts: Tensor) -> Tensor:
    """Return the clean latents that the network is shown: those known, then the last known one repeated.

    latents: [n, 4, f, 16, 16]. counts: [n] known first frames; clips of which none is known are shown zeros.
    What things look like so is at hand in every frame, and attention over time is left with how they move.
    """
    frames = torch.arange(latents.shape[2], device=latents.device)
    last = (counts[:, None] - 1).clamp(min=0)
    index = torch.minimum(frames[None], last)[:, None, :, None, None].expand_as(latents)
    return latents.gather(2, index) * (counts > 0)[:, None, None, None, None]


def velocity(latents: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
    """Return noise - x0 from x = (1 - sigma) x0 + sigma noise, sigma = timestep / 1000."""
    return (latents - x0) / (timestep / 1000)


def normalised(latents: Tensor) -> Tensor:
    """Return scaled latents [n, 4, ...] as the network sees them."""
    return (latents - _like(LATENT_MEAN, latents)) / _like(LATENT_STD, latents)


def plain(latents: Tensor) -> Tensor:
    """Return what `normalised` was given."""
    return latents * _like(LATENT_STD, latents) + _like(LATENT_MEAN, latents)


def _like(values: tuple[float, ...], latents: Tensor) -> Tensor:
    return torch.tensor(values).to(latents).reshape(-1, *(1,) * (latents.ndim - 2))


def transformer() -> WanTransformer3DModel:
    """Return the untrained network: 4 layers, 128 wide, 16 tokens a frame, 1.25M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        text_dim=128,
        freq_dim=128,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=512,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the flow schedule of training and sampling: most steps where noise decides what is where."""
    return FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
