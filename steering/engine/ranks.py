"""Particles of one prompt in several processes: who holds which slots, and how they meet.

Of the k particles of every prompt, process r of W denoises the slots r k/W ... (r+1) k/W - 1. All processes
make the same call and hold the same filter: rewards are gathered, each computes the same ancestors, and
survivors change hands (output, sample, the solver's history). Everything runs over torch.distributed, as
`accelerate launch` or `torchrun` start it. No other file knows of more than one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from diffplug.steering.engine.history import Rows
from diffplug.steering.engine.slots import Slots

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share the particles: `index` of this one, their `count`, and their process group.

    group: of torch.distributed, None for all processes.
    """

    index: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """Return the processes of a group, or of the whole job.

        A job that a launcher started is joined if nobody did so yet; without one there is a single process.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState()
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def everyone(self, make: Callable[[], T]) -> list[T]:
        """Return what `make` returns in each process, in their order; an error in one is raised in all.

        For small values: they are pickled.
        """
        if self.count == 1:
            return [make()]
        own: Exception | None = None
        try:
            mine: tuple[Any, str | None] = (make(), None)
        except Exception as error:
            own, mine = error, (None, str(error).partition("\n")[0])
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self.group)
        if own is not None:
            raise own
        for index, (_, message) in enumerate(found):
            if message is not None:
                raise ValueError(f"process {index} of {self.count} failed: {message}")
        return [value for value, _ in found]

    def stacked(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes, `[count, *x.shape]`, which is the same shape in each."""
        if self.count == 1:
            return x[None]
        on_wire = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        flat = x.detach().to(on_wire).contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(parts, flat, group=self.group)
        return torch.stack([part.view(x.dtype).reshape(x.shape) for part in parts]).to(x.device)


def slots_of(particles: int, ranks: bool | Ranks) -> Slots:
    """Return the slots of k particles: all here, or shared by the processes of a job or of a group.

    Raises ValueError where the processes do not divide the particles.
    """
    if ranks is False:
        return Slots(particles)
    return SharedSlots(particles, Ranks.of() if ranks is True else ranks)


@dataclass(frozen=True)
class SharedSlots(Slots):
    """The k slots of every prompt, k / W of them in each of W processes."""

    ranks: Ranks

    def __post_init__(self) -> None:
        if self.particles % self.ranks.count:
            raise ValueError(
                f"{self.particles} particles cannot be shared by {self.ranks.count} processes: "
                f"give a multiple of {self.ranks.count}"
            )

    @property
    def own(self) -> range:
        """Return the slots of this process."""
        size = self.particles // self.ranks.count
        return range(self.ranks.index * size, (self.ranks.index + 1) * size)

    @property
    def every_seed(self) -> bool:
        """Return True: a particle's noise must not depend on the process that holds it."""
        return True

    def mine(self, rows: Sequence[T]) -> list[T]:
        """Return, from one entry for every row `[P * k]`, those of this process."""
        starts = range(0, len(rows), self.particles)
        return [rows[start + slot] for start in starts for slot in self.own]

    def all(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, `[P * k, ...]`, from those of this one."""
        return self._joined(self.ranks.stacked(x))

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the rows of all processes; an error of `make` in one of them ends all."""
        return self._joined(torch.stack(self.ranks.everyone(make)))

    def _joined(self, by_rank: Tensor) -> Tensor:
        """Return rows `[P * k, ...]` of `[W, P * k / W, ...]`."""
        return by_rank.unflatten(1, (-1, len(self.own))).transpose(0, 1).flatten(0, 2)

    def all_items(self, items: Sequence[T]) -> list[T]:
        """Return the rows of all processes of things that are no tensors."""
        by_rank, size = self.ranks.everyone(lambda: list(items)), len(self.own)
        starts = range(0, len(items), size)
        return [item for start in starts for part in by_rank for item in part[start : start + size]]

    def total(self, number: int) -> int:
        """Return the sum of a number over all processes."""
        return sum(self.ranks.everyone(lambda: number))

    def first(self, value: T) -> T:
        """Return the value of the first process."""
        return self.ranks.everyone(lambda: value)[0]

    def agree(self, value: Any, what: str) -> None:
        """Raise ValueError, in every process, unless all of them have the same value."""
        if any(other != value for other in self.ranks.everyone(lambda: value)):
            raise ValueError(
                f"the processes that share particles have different {what}: each must make the same call, "
                "with the same steerer and seeds"
            )

    def moved(self, ancestors: Tensor) -> Rows | None:
        """Return the rows to continue from. Raises ValueError where the processes chose differently."""
        self.agree(ancestors.tolist(), "ancestors")
        rows = super().moved(ancestors)
        return None if rows is None else SharedRows(rows.source, self)


@dataclass(frozen=True, eq=False)
class SharedRows(Rows):
    """Rows that may continue from one in another process; `source` is numbered over all of them."""

    slots: SharedSlots

    @property
    def count(self) -> int:
        """Return how many rows a tensor of this process has."""
        return len(self.source) // self.slots.ranks.count

    def take(self, x: Tensor) -> Tensor:
        """Return this process's rows, each from where it continues; costs the memory of all rows."""
        mine = torch.tensor(self.slots.mine(self.source.tolist()), device=x.device)
        return self.slots.all(x).index_select(0, mine)

    def everywhere(self, found: bool) -> bool:
        """Return whether something holds in every process."""
        return all(self.slots.ranks.everyone(lambda: found))
