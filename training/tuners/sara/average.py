"""An exponential moving average of what SaRA trains: k numbers, not a copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffplug.training.tuners.sara.sara import SaRA

__all__ = ["VectorAverage"]


class VectorAverage:
    """a <- d a + (1 - d) p with d = min(decay, (1 + n) / (10 + n)) after n updates.

    average = VectorAverage(tuner, 0.999)
    ...                                       # average.update() after each optimiser step
    tuner.save("style.sara.safetensors", vectors=average.vectors)
    """

    def __init__(self, tuner: SaRA, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.tuner, self.decay, self.updates = tuner, decay, 0
        self.vectors = {name: value.detach().clone() for name, value in tuner.named_parameters().items()}
        tuner.on_adjust.append(self._adjusted)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the vectors as they are."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = self.tuner.named_parameters()
        torch._foreach_lerp_(list(self.vectors.values()), [now[n].detach() for n in self.vectors], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the model has the averaged weights."""
        now = self.tuner.named_parameters()
        own = {name: value.detach().clone() for name, value in now.items()}
        self._put(self.vectors)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, vectors: dict[str, Tensor]) -> None:
        for name, value in self.tuner.named_parameters().items():
            value.copy_(vectors[name])
        self.tuner.write()

    def _adjusted(self, lives: dict[str, Tensor]) -> None:
        self.vectors = {name: value[lives[name]] for name, value in self.vectors.items()}
