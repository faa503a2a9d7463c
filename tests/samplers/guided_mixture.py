"""A guided toy with a known answer: classifier-free guidance on a Gaussian mixture, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffplug.samplers import DCSolverScheduler
from diffplug.testing.gaussian_model import network_levels

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class GuidedMixture:
    """Six Gaussians in R^16; the prompt of a sample is one of them, guidance pulls towards it."""

    def __init__(self, guidance_scale: float = 7.5, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.guidance_scale = guidance_scale
        self.means = 0.9 * torch.randn(6, 16, generator=g, dtype=torch.float64)
        self.variances = 0.02 + 0.25 * torch.rand(6, 16, generator=g, dtype=torch.float64)
        self.log_weights = (0.5 * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(0)

    def pairs(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """n start noises [n, 16] and prompts [n]."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 16, generator=g, dtype=torch.float64)
        return x, torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=g)

    def epsilon(self, scheduler: Any, x: Tensor, timestep: Any, prompts: Tensor) -> Tensor:
        """The guided noise prediction, exact."""
        alpha, sigma = network_levels(scheduler, timestep)
        spread = alpha**2 * self.variances + sigma**2
        off = x[:, None] - alpha * self.means
        each = self.means + alpha * self.variances / spread * off
        log_p = self.log_weights - 0.5 * (off**2 / spread + spread.log()).sum(-1)
        plain = (log_p.softmax(-1)[..., None] * each).sum(1)
        x0 = plain + self.guidance_scale * (each[torch.arange(len(x)), prompts] - plain)
        return (x - alpha * x0) / sigma

    def sample(self, scheduler: Any, steps: int, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The solver's final samples from these pairs."""
        scheduler.set_timesteps(steps)
        x, prompts = pairs
        for t in scheduler.timesteps:
            x = scheduler.step(self.epsilon(scheduler, x, t, prompts), t, x).prev_sample
        return x

    def mean_squared_error(
        self,
        ratios: Sequence[float] | None,
        pairs: tuple[Tensor, Tensor],
        truth: Tensor,
        steps: int,
        **config: Any,
    ) -> float:
        """Of DC-Solver's final samples against the truth."""
        scheduler = DCSolverScheduler(**SD, dc_ratios=ratios, **config)
        return float(((self.sample(scheduler, steps, pairs) - truth) ** 2).mean())
