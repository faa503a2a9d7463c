"""Small networks and a dense reference for tests of SaRA."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A convolution, a 1x1 convolution, a norm and two linear layers; inputs are [n, 3, 8, 8]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(12, 8, 1),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(512, 24),
        nn.SiLU(),
        nn.Linear(24, 4),
    ).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    """Batches of inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with gradients everywhere."""
    return (model(x) - 1).square().mean()


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters as they are."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def masks(model: nn.Module, entries: Iterable) -> dict[str, Tensor]:
    """Where a tuner's entries lie, a bool tensor for each parameter."""
    found = {name: torch.zeros(value.numel(), dtype=torch.bool) for name, value in model.named_parameters()}
    for entry in entries:
        found[entry.name][entry.index.long()] = True
    return {name: mask.view_as(dict(model.named_parameters())[name]) for name, mask in found.items()}
