"""A network of a few hundred weights with prompts of two kinds, for tests of objectives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffplug.testing.families import SD_BETAS
from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath, edges
from diffplug.training.trajectories import Trajectories
from diffplug.training.tuners.full import FullTuner

FORM = CallForm("x", "timestep", 1.0, 1.0, (2,), {"return_dict": False}, ("told",))
VP = NoisePath.of(DDIMScheduler(**SD_BETAS))


class Denoiser(nn.Module):
    """eps of a 2-D state, a timestep, and a prompt's two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, timestep: Tensor, told: Tensor, return_dict: bool = True) -> Any:
        time = (timestep / 500 - 1).view(-1, 1).to(x.dtype)
        return (self.layers(torch.cat([x, time, told], dim=1)),)


def network(path: NoisePath = VP, *, dtype: torch.dtype = torch.float32) -> Network:
    """The denoiser with all its weights to be tuned, and a null condition of zeros."""
    torch.manual_seed(0)
    denoiser, tuner = Denoiser(), FullTuner()
    tuner.attach(denoiser)
    denoiser.to(dtype)
    tuner.before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    return Network(denoiser, path, FORM, tuner, Conditions({"told": torch.zeros(1, 2, dtype=dtype)}))


def conditions(n: int, dtype: torch.dtype = torch.float32) -> Conditions:
    """n prompts."""
    return Conditions({"told": torch.randn(n, 2, generator=torch.Generator().manual_seed(3)).to(dtype)})


def trajectories(net: Network, n: int, segments: int) -> Trajectories:
    """n made-up trajectories over the edges of the segments: smaller and smaller states."""
    index = torch.tensor(edges(net.path, segments)[::-1], dtype=torch.float64)
    start = torch.randn(n, 1, 2, generator=torch.Generator().manual_seed(4))
    states = start * torch.linspace(1, 0.2, segments + 1)[None, :, None]
    return Trajectories(states.half(), index, conditions(n), [f"prompt {i}" for i in range(n)])
