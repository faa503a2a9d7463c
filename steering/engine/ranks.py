"""Particles of one prompt in several processes: who holds which slots, and how they meet.

Of the k particles of every prompt, process r of W denoises the slots r k/W ... (r+1) k/W - 1. All processes
make the same call and hold the same filter: rewards are gathered, each computes the same ancestors, and
survivors change hands (output, sample, the solver's history). Everything runs over torch.distributed, as
`accelerate launch` or `torchrun` start it; a lone process is the special case in which nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

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
        """The processes of a group, or of the whole job.

        A job that a launcher started is joined if nobody did so yet; without one there is a single process.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState()
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def everyone(self, make: Callable[[], T]) -> list[T]:
        """What `make` returns in each process, in their order; an error in one of them is raised in all.

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

    def agree(self, value: Any, what: str) -> None:
        """Raise ValueError, in every process, unless all of them have the same value."""
        if any(other != value for other in self.everyone(lambda: value)):
            raise ValueError(
                f"the processes that share particles have different {what}: each must make the same call, "
                "with the same steerer and seeds"
            )

    def stacked(self, x: Tensor) -> Tensor:
        """The tensors of all processes, `[count, *x.shape]`, which is the same shape in each."""
        if self.count == 1:
            return x[None]
        on_wire = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        flat = x.detach().to(on_wire).contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(parts, flat, group=self.group)
        return torch.stack([part.view(x.dtype).reshape(x.shape) for part in parts]).to(x.device)


ALONE = Ranks()


@dataclass(frozen=True)
class Slots:
    """The k slots of every prompt, and which of them this process holds.

    Rows of this process are prompt-major over its own slots, `[P * k / W]`; rows of all of them are
    prompt-major over all slots, `[P * k]`. Raises ValueError where W does not divide k.
    """

    particles: int
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.particles % self.ranks.count:
            raise ValueError(
                f"{self.particles} particles cannot be shared by {self.ranks.count} processes: "
                f"give a multiple of {self.ranks.count}"
            )

    @property
    def own(self) -> range:
        """The slots of this process."""
        size = self.particles // self.ranks.count
        return range(self.ranks.index * size, (self.ranks.index + 1) * size)

    def mine(self, rows: Sequence[T]) -> list[T]:
        """From one entry for every row `[P * k]` to those of this process."""
        starts = range(0, len(rows), self.particles)
        return [rows[start + slot] for start in starts for slot in self.own]

    def all(self, x: Tensor) -> Tensor:
        """From the rows of this process to those of all, `[P * k, ...]`."""
        return self._joined(self.ranks.stacked(x)) if self.ranks.count > 1 else x

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """The same for small tensors on the CPU that `make` returns; its error in one process ends all."""
        return self._joined(torch.stack(self.ranks.everyone(make))) if self.ranks.count > 1 else make()

    def _joined(self, by_rank: Tensor) -> Tensor:
        """Rows `[P * k, ...]` of `[W, P * k / W, ...]`."""
        return by_rank.unflatten(1, (-1, len(self.own))).transpose(0, 1).flatten(0, 2)

    def all_items(self, items: Sequence[T]) -> list[T]:
        """The same for things that are no tensors, such as PIL images."""
        by_rank, size = self.ranks.everyone(lambda: list(items)), len(self.own)
        starts = range(0, len(items), size)
        return [item for start in starts for part in by_rank for item in part[start : start + size]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Where every row continues from: row i from row `source[i]`, numbered over all processes, `[P * k]`."""

    source: Tensor
    slots: Slots | None = None

    def __len__(self) -> int:
        """Return the rows of this process."""
        return len(self.source) // (1 if self.slots is None else self.slots.ranks.count)

    def take(self, x: Tensor) -> Tensor:
        """Return this process's rows, each from where it continues; x: the rows of this process.

        Costs the memory of all rows where survivors come from other processes.
        """
        if self.slots is None or self.slots.ranks.count == 1:
            return x.index_select(0, self.source.to(x.device))
        mine = torch.tensor(self.slots.mine(self.source.tolist()), device=x.device)
        return self.slots.all(x).index_select(0, mine)

    def in_all(self, found: bool) -> bool:
        """Whether something holds in every process."""
        return found if self.slots is None else all(self.slots.ranks.everyone(lambda: found))


def moved_rows(ancestors: Tensor, slots: Slots) -> Rows | None:
    """The rows that the slots continue from, or None where every particle stays.

    ancestors: `[P, k]` slots. Raises ValueError where the processes chose differently.
    """
    groups, k = ancestors.shape
    if slots.ranks.count > 1:
        slots.ranks.agree(ancestors.tolist(), "ancestors")
    if torch.equal(ancestors, torch.arange(k).expand_as(ancestors)):
        return None
    return Rows((ancestors + torch.arange(groups)[:, None] * k).reshape(-1), slots)
