"""The k slots of every prompt: which rows they are, and how rows are put together.

Rows are prompt-major, `[P * k]`. Everything here is for one process; `diffplug.steering.engine.ranks` has the
same for particles that are spread over several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffplug.steering.engine.history import Rows

T = TypeVar("T")


@dataclass(frozen=True)
class Slots:
    """The k slots of every prompt, all of them here."""

    particles: int

    @property
    def own(self) -> range:
        """Return the slots whose rows are here."""
        return range(self.particles)

    @property
    def every_seed(self) -> bool:
        """Return whether every particle needs a generator of its own, wherever it is denoised."""
        return False

    def mine(self, rows: Sequence[T]) -> list[T]:
        """Return, from one entry for every row `[P * k]`, those whose rows are here."""
        return list(rows)

    def all(self, x: Tensor) -> Tensor:
        """Return the rows of all slots, `[P * k, ...]`, from those that are here."""
        return x

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the rows of all slots of a small tensor on the CPU that `make` returns."""
        return make()

    def all_items(self, items: Sequence[T]) -> list[T]:
        """Return the rows of all slots of things that are no tensors, such as PIL images."""
        return list(items)

    def total(self, number: int) -> int:
        """Return the sum of a number over all places where particles are."""
        return number

    def first(self, value: T) -> T:
        """Return the value that counts where several were drawn."""
        return value

    def agree(self, value: Any, what: str) -> None:
        """Raise ValueError unless the value is the same wherever particles are."""

    def moved(self, ancestors: Tensor) -> Rows | None:
        """Return the rows that the slots continue from, or None where every particle stays.

        ancestors: `[P, k]` slots.
        """
        groups, k = ancestors.shape
        if torch.equal(ancestors, torch.arange(k).expand_as(ancestors)):
            return None
        return Rows((ancestors + torch.arange(groups)[:, None] * k).reshape(-1))
