"""Masked diffusion over token sequences (arXiv 2406.07524), in a form that every steerer can stand at.

    pipe = MaskedSequencePipeline(network, MaskedDiffusionScheduler(mask_token_id=4), length=50)
    with plug(pipe, FeynmanKac(reward, particles=8, value=ManySamples(draws=4))):
        tokens = pipe(num_inference_steps=128).images          # [1, 50] int64

The reward gets `[n, length]` int64 tokens in place of images; before the end those are the likeliest tokens,
or with `ManySamples` draws from the network's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class SequenceOutput(BaseOutput):
    """What a sequence pipeline returns; `images` holds the tokens `[n, length]`."""

    images: Tensor


@dataclass
class MaskedStep(BaseOutput):
    """What a step returns: the next tokens."""

    prev_sample: Tensor


class MaskedDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of masked diffusion with the log-linear schedule.

    With r steps to go every masked place is filled with chance 1 / r, from the network's own probabilities,
    places independently; filled places stay. mask_token_id: the token that stands for a mask.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, mask_token_id: int) -> None:
        self.timesteps = torch.arange(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Count down from num_inference_steps - 1 to 0. Raises ValueError for fewer than one step."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: it must be at least 1")
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the next tokens `[n, l]` from logits `[n, l, codes]`, tokens `[n, l]` and one generator."""
        n, length, codes = model_output.shape
        device = generator.device if generator is not None else model_output.device
        chances = model_output.float().softmax(-1).reshape(-1, codes).to(device)
        drawn = torch.multinomial(chances, 1, generator=generator).reshape(n, length).to(sample.device)
        u = torch.rand(n, length, generator=generator, device=device).to(sample.device)
        fill = (sample == self.config.mask_token_id) & (u < 1.0 / (int(timestep) + 1))
        after = torch.where(fill, drawn, sample)
        return MaskedStep(prev_sample=after) if return_dict else (after,)


class MaskedSequencePipeline:
    """Draws sequences with a masked-token network: `transformer(tokens [n, l]) -> logits [n, l, codes]`."""

    def __init__(self, transformer: torch.nn.Module, scheduler: Any, length: int) -> None:
        self.transformer, self.scheduler, self.length = transformer, scheduler, length

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 64,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        """Return a `SequenceOutput` of `batch_size` sequences, or a tuple of its tokens."""
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.full((batch_size, self.length), self.scheduler.config.mask_token_id)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x), t, x, generator=generator).prev_sample
        return SequenceOutput(images=x) if return_dict else (x,)
