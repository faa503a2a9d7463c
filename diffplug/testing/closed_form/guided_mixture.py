"""Classifier-free guidance with a known answer: a Gaussian mixture whose prompts are its components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffplug.testing.closed_form.gaussian import network_levels


class GuidedMixture:
    """Six Gaussians in R^16; the prompt of a sample is one of them, and guidance pulls towards it.

    means, variances: [6, 16] with means 0.9 N(0, 1) and variances uniform in [0.02, 0.27]; log_weights: [6].
    Everything is float64. guidance_scale 1 samples the component of the prompt.
    """

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

    def x0(self, x: Tensor, alpha: float, sigma: float, prompts: Tensor) -> Tensor:
        """The guided mean of the clean sample given x = alpha x0 + sigma eps, [n, 16]: exact."""
        spread = alpha**2 * self.variances + sigma**2
        off = x[:, None] - alpha * self.means
        each = self.means + alpha * self.variances / spread * off
        log_p = self.log_weights - 0.5 * (off**2 / spread + spread.log()).sum(-1)
        plain = (log_p.softmax(-1)[..., None] * each).sum(1)
        return plain + self.guidance_scale * (each[torch.arange(len(x)), prompts] - plain)

    def epsilon(self, x: Tensor, alpha: float, sigma: float, prompts: Tensor) -> Tensor:
        """The guided prediction of the noise, [n, 16]: exact."""
        return (x - alpha * self.x0(x, alpha, sigma, prompts)) / sigma

    def network(self, scheduler: Any, x: Tensor, timestep: Any, prompts: Tensor) -> Tensor:
        """The output for a scheduler that takes noise predictions, at one of its timesteps."""
        return self.epsilon(x, *network_levels(scheduler, timestep), prompts)

    def sample(self, scheduler: Any, steps: int, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The final samples [n, 16] of a scheduler that takes noise predictions, from these pairs."""
        scheduler.set_timesteps(steps)
        x, prompts = pairs
        for t in scheduler.timesteps:
            x = scheduler.step(self.network(scheduler, x, t, prompts), t, x).prev_sample
        return x
