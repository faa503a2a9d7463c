"""One-dimensional data behind a scheduler, with an exact clean prediction: the truth for what steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffplug.noise.families import reading

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Mixture:
    """Data law: components of weight w, mean m and variance v."""

    components: tuple[tuple[float, float, float], ...]

    def x0hat(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return E[x0 | x] exactly."""
        w, m, v = (torch.tensor(c, dtype=x.dtype) for c in zip(*self.components, strict=True))
        total = alpha**2 * v + sigma**2
        logp = w.log() - 0.5 * total.log() - 0.5 * (x - alpha * m) ** 2 / total
        means = m + alpha * v / total * (x - alpha * m)
        return (torch.softmax(logp, -1) * means).sum(-1, keepdim=True)


GAUSSIAN = Mixture(((1.0, 1.0, 0.25),))
TWO_HUMPS = Mixture(((0.7, -2.0, 0.25), (0.3, 2.0, 0.25)))


def ddim(**kwargs: Any) -> Any:
    """Return a DDIM scheduler that ends on clean data."""
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, **kwargs)


def denoise(scheduler: Any, data: Mixture, x: Tensor, steps: int = 20, **step_kwargs: Any) -> Tensor:
    """Return the chain's end from start noise x `[n, 1]`; the network is exact, and predicts what the
    scheduler expects.
    """
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        now = reading(scheduler, t)
        x0 = data.x0hat(x, now.level.alpha, now.level.sigma)
        x = scheduler.step((x0 - now.keep * x) / now.gain, t, x, **step_kwargs).prev_sample
    return x
