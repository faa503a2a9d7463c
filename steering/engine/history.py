"""What moves when particles are replaced: every tensor of a scheduler or guider with one row per particle.

A multistep solver remembers earlier outputs. They belong to a particle: a copy that continues with another
particle's history is not a sample of the solver's chain (measured errors: 0.3 % to 150 % of the latent
range).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffplug.steering.engine.ranks import Rows

_FRESH = "noise"


def reindex_scheduler(scheduler: Any, rows: Rows, shapes: set[torch.Size]) -> None:
    """Replace, on the scheduler, every per-sample tensor x by the rows it continues from.

    shapes: shapes of the sample and of the output of this call; an attribute counts as
    per-sample if it is a tensor of such a shape, or a list or tuple that holds one. A scheduler with a method
    `per_sample_state()` names its attributes itself, and nothing else is touched.
    """
    names = getattr(scheduler, "per_sample_state", None)
    for name in list(names() if callable(names) else vars(scheduler)):
        value = getattr(scheduler, name)
        moved = reindex(value, rows, None if callable(names) else shapes)
        if moved is not value:
            setattr(scheduler, name, moved)


def reindex(value: Any, rows: Rows, shapes: set[torch.Size] | None = None) -> Any:
    """Return `value` with its per-sample tensors taken at `rows`; the very same object if it has none.

    shapes: which tensors are per-sample; None means every tensor with as many rows.
    """
    if isinstance(value, Tensor):
        fits = value.ndim > 0 and len(value) == len(rows) if shapes is None else value.shape in shapes
        return rows.take(value) if fits else value
    if type(value) in (list, tuple):
        moved = [reindex(item, rows, shapes) for item in value]
        changed = any(new is not old for new, old in zip(moved, value, strict=True))
        return type(value)(moved) if changed else value
    return value


def reindex_arguments(arguments: dict[str, Any], rows: Rows, shapes: set[torch.Size]) -> dict[str, Any]:
    """Return step arguments with per-sample tensors taken at `rows`; given noise stays in its slot, it is
    fresh there.
    """
    return {
        name: value if _FRESH in name else reindex(value, rows, shapes) for name, value in arguments.items()
    }


def reindex_guiders(guiders: Iterable[Any], rows: Rows) -> None:
    """Move the momentum of guiders (adaptive projected guidance) with its particles."""
    for guider in guiders:
        buffer = getattr(guider, "momentum_buffer", None)
        if buffer is not None:
            buffer.running_average = reindex(buffer.running_average, rows)
