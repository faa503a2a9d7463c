"""A call for some of its prompts only, and one output out of parts of several calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LABELS = ("class_labels", "image", "mask_image", "control_image", "generator", "latents")
_ROWS_IN_ALL = "batch_size"


def of_prompts(
    kwargs: Mapping[str, Any], chosen: Sequence[int], groups: int, particles: int = 1
) -> dict[str, Any]:
    """Return a call's arguments for some of its prompts.

    kwargs: with one entry a prompt, or one for each of `particles` rows of every prompt, where there are
    several prompts; anything else stays.
    """
    if list(chosen) == list(range(groups)):
        return dict(kwargs)
    rows = [group * particles + slot for group in chosen for slot in range(particles)]
    found = {name: _some(name, value, chosen, groups, rows, particles) for name, value in kwargs.items()}
    if isinstance(kwargs.get(_ROWS_IN_ALL), int):
        found[_ROWS_IN_ALL] = kwargs[_ROWS_IN_ALL] // groups * len(chosen)
    return found


def _some(
    name: str, value: Any, chosen: Sequence[int], groups: int, rows: Sequence[int], particles: int
) -> Any:
    named = name in _LABELS or "prompt" in name or "encoder_hidden_states" in name
    if (
        not named
        or not isinstance(value, (list, tuple, Tensor))
        or (isinstance(value, Tensor) and not value.ndim)
    ):
        return value
    picks = {groups: list(chosen), groups * particles: list(rows)}.get(len(value))
    if picks is None:
        return value
    return value[picks] if isinstance(value, Tensor) else type(value)(value[i] for i in picks)


def gathered(parts: Sequence[tuple[Any, int]], picks: Sequence[tuple[int, int]]) -> Any:
    """Return one output of the same kind with rows of several.

    parts: outputs, and how many rows each has. picks: (part, row) of each row wanted. What has no rows is the
    first part's.
    """
    first = parts[0][0]
    if isinstance(first, tuple):
        columns = [[output[i] for output, _ in parts] for i in range(len(first))]
        return tuple(_gathered(column, parts, picks) for column in columns)
    names = [entry.name for entry in fields(first)]
    made = {name: _gathered([getattr(output, name) for output, _ in parts], parts, picks) for name in names}
    return type(first)(**made)


def _gathered(
    values: Sequence[Any], parts: Sequence[tuple[Any, int]], picks: Sequence[tuple[int, int]]
) -> Any:
    first = values[0]
    has_rows = isinstance(first, (list, Tensor, np.ndarray)) and all(
        len(value) == rows for value, (_, rows) in zip(values, parts, strict=True)
    )
    if not has_rows:
        return first
    chosen = [values[part][row] for part, row in picks]
    if isinstance(first, Tensor):
        return torch.stack(chosen)
    return np.stack(chosen) if isinstance(first, np.ndarray) else chosen
