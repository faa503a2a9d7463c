"""A UniPC-shaped scheduler with nodes that are found by their number, or by their very time."""

from __future__ import annotations

import torch
from diffusers import UniPCMultistepScheduler


class NodeScheduler(UniPCMultistepScheduler):
    """What image-to-image pipelines ask of a solver: the node of a timestep, and samples noised to it."""

    _noised = False  # whether a sample was noised before the first step: it does not start as pure noise

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy samples at nodes of the run, as Diffusers' solvers make them."""
        self._noised = self._noised or self._step_index is None
        noisy: torch.Tensor = super().add_noise(original_samples, noise, timesteps)
        return noisy

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` under the name and in the argument order that flow img2img pipelines use."""
        if noise is None:
            raise ValueError("scale_noise got no noise: pass noise= of the sample's shape")
        return self.add_noise(sample, noise, torch.atleast_1d(timestep))

    def index_for_timestep(
        self, timestep: int | float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """The first node at this timestep. Raises ValueError when the grid has no such node."""
        nodes = self.timesteps if schedule_timesteps is None else schedule_timesteps
        distance = (nodes - timestep).abs()
        index = int(distance.argmin())
        if float(distance[index]) > 0.5:
            raise ValueError(
                f"timestep {float(timestep):g} is not on the grid {nodes.tolist()}: pass one of its nodes"
            )
        return index
