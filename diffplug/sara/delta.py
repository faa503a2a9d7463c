"""Differences to a few entries of a model's weights, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRINTS", "Delta", "SparseDelta", "print_places"]

PRINTS = 16  # original values of a tensor that are kept, to know the base again


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to some entries of one tensor.

    shape: of the tensor. index: int32 [k], rising flat positions in C order. values: [k], what is added at
    scale 1. prints: float32 [16], the base's own values at `print_places`, None where unknown.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    prints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """Deltas of a pipeline's components.

    components: by component and parameter name. classes: the components' class names. info: what the trainer
    kept (threshold, density, learning rate, updates, base model), JSON values.
    """

    components: Mapping[str, Mapping[str, Delta]]
    classes: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(delta) for _, _, delta in self.entries())

    def entries(self) -> Iterator[tuple[str, str, Delta]]:
        """Yield (component, parameter name, delta)."""
        for component, deltas in self.components.items():
            for name, delta in deltas.items():
                yield component, name, delta


def print_places(count: int) -> Tensor:
    """Return the 16 places floor(j k / 16) among k entries whose originals tell one base from another."""
    return torch.arange(PRINTS) * count // PRINTS
