"""A pipeline's output, whatever its form: its pictures as one tensor, and the same output with fewer rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.steering.engine.slots import Slots


def take(output: Any, rows: Sequence[int], total: int) -> Any:
    """Return the same kind of output with only these rows, in this order; what has no `total` rows stays."""
    return _changed(output, lambda value: _taken(value, rows, total))


def of_all(output: Any, total: int, slots: Slots) -> Any:
    """Return the same kind of output with the rows of all slots, from one with the `total` rows here."""
    if len(slots.own) == slots.particles:
        return output
    return _changed(output, lambda value: _of_all(value, total, slots))


def _changed(output: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(output, tuple):
        return tuple(change(value) for value in output)
    return type(output)(**{entry.name: change(getattr(output, entry.name)) for entry in fields(output)})


def _of_all(value: Any, total: int, slots: Slots) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == total:
        return slots.all(value)
    if isinstance(value, np.ndarray) and value.ndim and len(value) == total:
        return slots.all(torch.from_numpy(value)).numpy()
    if isinstance(value, list) and len(value) == total:
        return slots.all_items(value)
    return value


def _taken(value: Any, rows: Sequence[int], total: int) -> Any:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == total:
        return value[list(rows)]
    if isinstance(value, list) and len(value) == total:
        return [value[row] for row in rows]
    return value


def best_first(rewards: Tensor, islands: int = 1) -> list[int]:
    """Return slots by falling reward `[k]`, the best one of each island before all others."""
    order = torch.argsort(rewards, descending=True, stable=True).tolist()
    size = len(order) // islands
    met: set[int] = set()
    leaders = [slot for slot in order if not (slot // size in met or met.add(slot // size))]  # type: ignore[func-returns-value]
    leaders = [slot for slot in leaders if rewards[slot] > -torch.inf]
    return leaders + [slot for slot in order if slot not in leaders]
