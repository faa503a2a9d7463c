"""The clean prediction at a call: latents by the scheduler's own mathematics, tokens by likeliest code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffplug import latents
from diffplug.intercept import StepCall
from diffplug.noise.families import Level, level, x0hat


def clean_prediction(call: StepCall) -> Tensor:
    """Return x0hat `[n, ...]` of a step's arguments; for tokens the likeliest code at masked places."""
    if call.sample.is_floating_point():
        return x0hat(call.scheduler, call.model_output, call.timestep, call.sample)
    masked = call.sample == call.scheduler.config.mask_token_id
    codes = call.model_output.argmax(1 if call.sample.ndim == 3 else -1)
    return torch.where(masked, codes, call.sample)


def level_of(call: StepCall) -> Level | None:
    """Return signal and noise of a step's sample; None for tokens."""
    return level(call.scheduler, call.timestep) if call.sample.is_floating_point() else None


def decode(pipe: Any, x: Tensor, *, batch_size: int = 4, **size: Any) -> Tensor:
    """Return pictures `[n, 3, h, w]` in [0, 1] of latents (`diffplug.latents.decode`) or of token maps
    `[n, h, w]`, which the pipeline's `vqvae` decodes `batch_size` rows at a time; sequences `[n, l]` of
    tokens are returned as they are.
    """
    if x.is_floating_point():
        return latents.decode(pipe, x, batch_size=batch_size, **size)
    if x.ndim == 2:
        return x
    vqvae = pipe.vqvae
    pictures = []
    for rows in x.split(batch_size):
        shape = (*rows.shape, vqvae.config.latent_channels)
        out = vqvae.decode(rows, force_not_quantize=True, shape=shape).sample
        pictures.append(out.float().clamp(0, 1))
    return torch.cat(pictures)
