"""Where windows lie on a long video, how much their frames weigh, and frames in the decoder's units.

L, W, O and S = W - O are the length, window, overlap and stride in *latent* frames. People speak of frames: a
causal video decoder makes 1 + c (L - 1) of them from L latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "WEIGHTS",
    "frames_of",
    "latents_of",
    "plan",
    "temporal_compression",
    "window_weights",
]

WEIGHTS = ("pyramid", "flat")


def plan(length: int, window: int, overlap: int) -> tuple[int, ...]:
    """Return the first frames of windows over `length` frames: 0, S, 2S, ..., and one at the very end.

    No window is ever shorter than `window`, the length that the network knows: where frames are left over,
    the last window is moved back to end with the video. There are 1 + ceil((L - W) / S) of them; a single one
    where the video is no longer than a window.
    """
    if length <= window:
        return (0,)
    starts = tuple(range(0, length - window + 1, window - overlap))
    return starts if starts[-1] + window == length else (*starts, length - window)


def window_weights(window: int, kind: str) -> Tensor:
    """Return the weights of a window's frames, [w] float64: "flat" 1, "pyramid" min(j + 1, W - j)."""
    if kind == "flat":
        return torch.ones(window, dtype=torch.float64)
    place = torch.arange(window, dtype=torch.float64)
    return torch.minimum(place + 1, window - place)


_COMPRESSION = (
    "vae_scale_factor_temporal",  # Wan, CogVideoX, HunyuanVideo, Allegro
    "vae_temporal_compression_ratio",  # LTX
    "vae_temporal_scale_factor",  # Mochi
)


def temporal_compression(pipe: object) -> int:
    """Return how many frames a latent frame stands for after the first; 1 for decoders of single frames."""
    found = (getattr(pipe, name, None) for name in _COMPRESSION)
    return next((int(ratio) for ratio in found if isinstance(ratio, int)), 1)


def latents_of(frames: int, compression: int, what: str) -> int:
    """Return the latent frames of `frames` frames, which must be 1 + c n.

    Raises ValueError, with the two lengths next to it, for any other number. what: its name in the message.
    """
    if (frames - 1) % compression:
        below = 1 + (frames - 1) // compression * compression
        raise ValueError(
            f"{what} {frames} does not fit this model, whose latents stand for {compression} frames: take "
            f"{below} or {below + compression}"
        )
    return (frames - 1) // compression + 1


def frames_of(latents: int, compression: int) -> int:
    """Return the frames that so many latent frames are decoded to."""
    return 1 + compression * (latents - 1)
