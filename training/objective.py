"""What a training method is to the trainer: groups of parameters, and a loss for the rows of an update.

    class Halving(Objective):                       # a whole method; see tests/training/test_trainer.py
        def groups(self) -> list[Group]:
            return [Group("weights", dict(self.network.named_parameters()))]

        def loss(self, rows: Rows) -> Loss:
            x = rows.normal(4)
            return Loss((self.network(x) - x / 2).square().mean(1))

A *row* is the unit that an update's batch is counted in: a picture, a pair, a state. Whatever is random about
a row comes from `Rows`, and depends on (seed, update, row) alone: not on how many processes share the batch,
nor on how many rows one works on at once, nor on what happened before. So a run can be resumed bit for bit,
and an update that ran out of memory can be done again in smaller parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Group", "Loss", "Objective", "Rows"]


@dataclass(frozen=True)
class Group:
    """Parameters that move together.

    parameters: by name, float32 leaves. lr: factor of the run's learning rate. start: first update in which
    they move; their warm-up begins there. average: whether an exponential average is kept (and returned).
    """

    name: str
    parameters: Mapping[str, Tensor]
    lr: float = 1.0
    start: int = 0
    average: bool = True


@dataclass(frozen=True)
class Loss:
    """The loss of some rows.

    errors: [n] one loss a row, with a graph; the batch's loss is their mean, weighted by `weights`.
    weights: [n] or None for ones; a row that should not count has weight 0 (preference pairs that tie).
    log: scalars to be averaged like the loss and logged. totals: tensors to be summed over all rows of the
    update, those of other processes included, and handed to `Objective.updated`. timesteps: [n], named when
    a loss is NaN.
    """

    errors: Tensor
    weights: Tensor | None = None
    log: Mapping[str, Tensor] = field(default_factory=dict)
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    timesteps: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The summed weight of the rows, a scalar."""
        if self.weights is None:
            return torch.tensor(float(len(self.errors)), device=self.errors.device)
        return self.weights.sum()

    @property
    def sum(self) -> Tensor:
        """The weighted sum of the rows' losses, a scalar with a graph."""
        return (self.errors if self.weights is None else self.errors * self.weights).sum()


class Objective:
    """A training method. Only `groups` and `loss` must be written; the rest has a default.

    divisible: whether `loss` may be asked for a part of an update's rows. needs_pipe: whether the pipeline's
    other parts (text encoders, autoencoder) have to stay on the device. local_state: whether `state_dict`
    differs from process to process (a buffer of roll-outs); then a run resumes only with as many processes.
    """

    divisible: bool = True
    needs_pipe: bool = False
    local_state: bool = False

    def groups(self) -> list[Group]:
        """Return what learns; called once, when the trainer is built."""
        raise NotImplementedError

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of these rows of an update. May be asked again for fewer rows."""
        raise NotImplementedError

    def before(self, update: int) -> None:
        """Do what comes before an update's loss, such as a new roll-out every so many updates."""

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Take note of an update that was made; `totals` are those of its losses, summed over everything."""

    def finished(self) -> str:
        """Return why the run should end here, with the weights that it has; empty to go on.

        Must say the same on every process.
        """
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run has to know beside parameters, optimiser and averages."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""


class Rows:
    """Some rows of one update and their random numbers.

    seed, update: of the run. batch: rows of the whole update. rows: the numbers, 0 ... batch - 1, of those
    that are worked on now. device: where noise is wanted; it is drawn on the CPU, the same everywhere.
    """

    def __init__(self, seed: int, update: int, batch: int, rows: range, device: Any = "cpu") -> None:
        self.seed, self.update, self.batch, self.rows = seed, update, batch, rows
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        words = (np.random.SeedSequence([self.seed, self.update, row]).generate_state(2) for row in self.rows)
        return [torch.Generator().manual_seed(int(a) << 31 ^ int(b)) for a, b in words]

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers [n, *shape], float32 on the device."""
        drawn = [torch.randn(shape, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), [n, *shape], float64 on the CPU."""
        drawn = [torch.rand(shape, generator=g, dtype=torch.float64) for g in self._generators]
        return torch.stack(drawn)

    def integers(self, low: int, high: int | Tensor) -> Tensor:
        """Return whole numbers from `low` to `high` - 1, [n] on the CPU; `high` may be one number a row."""
        span = torch.as_tensor(high) - low
        return low + (self.uniform() * span).long().clamp(max=span - 1)

    def items(self, count: int) -> Tensor:
        """Return the number of a data item for each row, [n]: every item once before any comes again."""
        places = [self.update * self.batch + row for row in self.rows]
        order = [int(_order(self.seed, place // count, count)[place % count]) for place in places]
        return torch.tensor(order, dtype=torch.long)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Any:
    return np.random.default_rng([seed, epoch, 5]).permutation(count)
