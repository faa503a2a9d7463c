"""Searches' problems on two models in closed form: a Gaussian mixture, and the digits of scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from benchmarks.closed_form import ModelProblem
from diffplug.network.cache import NetworkCache
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.testing.closed_form.posterior_means import digits, round_mixture

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))
NODES = Nodes(kind="name", name="linspace", final="sigma_min")
MODELS = {"mixture": round_mixture, "digits": digits}


def problems(name: str, sizes: tuple[int, ...], seed: int = 1, fine: int = 300) -> list[ModelProblem]:
    """One problem for each size, on noises drawn one after another from a generator with this seed."""
    dimensions, x0 = MODELS[name]()
    g = torch.Generator().manual_seed(seed)

    network_cache = NetworkCache(limit=2**28)

    def exact(x: Tensor, timestep: float) -> Tensor:
        level = LEVELS.level(float(LEVELS.sigma_of_time(timestep)))
        return (x - level.alpha * x0(x, level.alpha, level.sigma)) / level.sigma

    def epsilon(x: Tensor, timestep: float) -> Tensor:
        return network_cache.call(exact, (x, timestep), {})

    noises = [torch.randn(n, dimensions, generator=g, dtype=torch.float64) for n in sizes]
    return [ModelProblem(epsilon, x, LEVELS, NODES, fine) for x in noises]
