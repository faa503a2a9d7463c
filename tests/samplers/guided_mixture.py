"""The guided mixture behind a scheduler: what DC-Solver does to it, and how far that is from a truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffplug.samplers import DCSolverScheduler
from diffplug.testing import guided_mixture
from diffplug.testing.gaussian_model import network_levels

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class GuidedMixture(guided_mixture.GuidedMixture):
    """The mixture as the network of a scheduler that predicts noise."""

    def epsilon(self, scheduler: Any, x: Tensor, timestep: Any, prompts: Tensor) -> Tensor:
        """The guided noise prediction, exact."""
        alpha, sigma = network_levels(scheduler, timestep)
        return (x - alpha * self.x0(x, alpha, sigma, prompts)) / sigma

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
