"""The rows of a network's call: how many there are, and an argument with only some of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["SHARED", "cut_rows", "rows_of"]

SHARED = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments that hold positions, the same for all rows."""


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many rows a call has: those of its first argument that is a batch, 0 where none is."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return 0


def cut_rows(value: Any, part: slice, n: int) -> Any:
    """Return some rows of an argument, tensors with n of them at any depth; anything else as it is."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == n else value
    if isinstance(value, list) and len(value) == n and all(isinstance(item, Tensor) for item in value):
        return value[part]
    if type(value) in (list, tuple):
        return type(value)(cut_rows(item, part, n) for item in value)
    return {k: cut_rows(v, part, n) for k, v in value.items()} if type(value) is dict else value
