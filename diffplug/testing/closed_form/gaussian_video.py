"""A video that is known exactly: one pixel, stationary Gaussian, with the exact network and the exact next
clip.

The covariance of frames i and j is a + (1 - a) rho^|i - j|: a is what the scene shares over all time, rho how
fast the rest moves on. So everything that windows or continuation do to a video can be compared with numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

__all__ = ["ExactContinuation", "GaussianVideo", "LinearDenoiser", "covariance"]

SCENE, MOTION = 0.5, 0.9


def covariance(frames: int) -> Tensor:
    """Return the covariance of so many frames, [f, f] float64."""
    lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs().double()
    return SCENE + (1 - SCENE) * MOTION**lag


class LinearDenoiser(nn.Module):
    """The exact velocity noise - x0 of the Gaussian video, for any number of frames; x is [n, 1, f, h, w]."""

    config = type("Config", (dict,), {"out_channels": 1})()

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the velocity; timesteps are 1000 sigma."""
        velocity = self.matrix(hidden_states.shape[2], float(timestep) / 1000)
        return (torch.einsum("ij,bcjhw->bcihw", velocity, hidden_states),)

    def matrix(self, frames: int, sigma: float) -> Tensor:
        """Return the velocity as a matrix on frames, [f, f] float32."""
        c, one = covariance(frames), torch.eye(frames, dtype=torch.float64)
        x0 = (1 - sigma) * torch.linalg.solve((1 - sigma) ** 2 * c + sigma**2 * one, c).T
        return ((one - (1 - sigma) * x0) / sigma - x0).float()


class GaussianVideo:
    """A pipeline around the exact network: flow Euler, 50 steps, shift 3."""

    vae_scale_factor_temporal = 1

    def __init__(self) -> None:
        self.transformer = LinearDenoiser()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def prepare_latents(self, n: int, frames: int, generator: Any) -> Tensor:
        """Return the initial noise of n videos."""
        return torch.randn(n, 1, frames, 1, 1, generator=generator)

    def __call__(
        self,
        num_frames: int = 16,
        n: int = 20_000,
        num_inference_steps: int = 50,
        generator: Any = None,
        latents: Any = None,
    ) -> Tensor:
        """Return n videos [n, f]."""
        self.scheduler.set_timesteps(num_inference_steps)
        x = self.prepare_latents(n, num_frames, generator) if latents is None else latents
        for t in self.scheduler.timesteps:
            velocity = self.transformer(hidden_states=x, timestep=t)[0]
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        return x[:, 0, :, 0, 0]


class ExactContinuation:
    """A hand-over to the exact law of a clip given its first frames; each pixel is a draw of its own.

    bias: what every hand-over adds to the frames, as a decoder's round trip does. size: of a frame's side.
    """

    name = "exact"

    def __init__(self, bias: float = 0.0, size: int = 80) -> None:
        self.bias, self.size = bias, size

    def trouble(self, prefix_frames: int) -> str:
        """Return nothing: every prefix can be continued."""
        return ""

    def clip(self, prefix: Tensor | None, frames: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return a clip [frames, 3, size, size] that begins with the prefix."""
        shape = (frames, 3, self.size, self.size)
        noise = torch.randn(frames, 3 * self.size**2, generator=arguments["generator"])
        c = covariance(frames)
        if prefix is None:
            return (torch.linalg.cholesky(c).float() @ noise).reshape(shape)
        p = len(prefix)
        gain = torch.linalg.solve(c[:p, :p], c[:p, p:]).T
        rest = torch.linalg.cholesky(c[p:, p:] - gain @ c[:p, p:])
        known = prefix.reshape(p, -1) + self.bias
        return torch.cat([known, gain.float() @ known + rest.float() @ noise[p:]]).reshape(shape)
