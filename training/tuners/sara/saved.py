"""What a SaRA leaves: differences for a file, and a state to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffplug.sara.delta import Delta, print_places
from diffplug.training.tuners.sara.distributed import Shards, gathered
from diffplug.training.tuners.sara.entry import Entry

__all__ = ["deltas_of", "state_of", "take_state"]


def deltas_of(
    entries: Sequence[Entry], shards: Shards, vectors: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, Delta]]:
    """Return the differences by component and tensor, of all processes.

    vectors: in place of the current ones.
    """
    found: dict[str, dict[str, Delta]] = {}
    for entry in entries:
        index, before, delta = _whole(entry, shards, None if vectors is None else vectors[entry.key])
        prints = before[print_places(len(index))].float()
        shape = tuple(entry.weight.shape)
        found.setdefault(entry.component, {})[entry.name] = Delta(shape, index.int(), delta, prints)
    return found


def _whole(entry: Entry, shards: Shards, vector: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return all positions of a tensor, over all processes, with originals and differences."""
    with _holding(entry, vector):
        index, before, delta = entry.all()
    width = entry.weight.shape[1:].numel()
    both = torch.stack([before.to(delta), delta], 1)
    index, both = gathered(index.long() + shards.first_row(entry.weight) * width, both, shards)
    return index, both[:, 0], both[:, 1]


@contextmanager
def _holding(entry: Entry, vector: Tensor | None) -> Iterator[None]:
    """A block in which an entry's vector is another one."""
    own = entry.vector.data
    if vector is not None:
        entry.vector.data = vector.detach().to(own)
    try:
        yield
    finally:
        entry.vector.data = own


def state_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return vectors and frozen entries."""
    stopped = [(entry, entry.frozen) for entry in entries if entry.frozen is not None]
    return {
        "vectors": {entry.key: entry.vector.detach().clone() for entry in entries},
        "index": {entry.key: entry.index.clone() for entry, _ in stopped},
        "frozen": {entry.key: frozen.delta.clone() for entry, frozen in stopped},
    }


@torch.no_grad()
def take_state(entries: Sequence[Entry], state: Mapping[str, Any]) -> None:
    """Take back what `state_of` returned; ValueError where it belongs to another choice of weights."""
    for entry in entries:
        saved = state["vectors"].get(entry.key)
        if saved is None:
            raise ValueError(
                f"the saved state has no {entry.key}: it was made with another choice of weights"
            )
        if entry.key in state["index"] and entry.frozen is None:
            live = torch.isin(entry.index, state["index"][entry.key].to(entry.index))
            entry.keep(torch.nonzero(live)[:, 0])
        if entry.frozen is not None:
            entry.frozen.delta.copy_(state["frozen"][entry.key])
            entry.write_frozen()
        if saved.shape != entry.vector.shape:
            raise ValueError(
                f"the saved state has {len(saved)} entries of {entry.key}, here are {len(entry.vector)}: "
                "take the same density and the same base"
            )
        entry.vector.copy_(saved)
