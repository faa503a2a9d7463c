"""The denoiser on a few rows at a time, for populations that do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.denoiser import denoisers, wrap_forward

_SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # positions, the same for all rows


@contextmanager
def sliced_network(pipe: Any, rows: int | None) -> Iterator[None]:
    """The denoisers of a pipeline take at most so many rows at a time while the block runs; None: all.

    Every row goes through the network alone in either case, so that results differ by rounding at most.
    Raises ValueError for guidance that mixes rows inside the network (perturbed attention).
    """
    if rows is None:
        yield
        return
    if getattr(pipe, "do_perturbed_attention_guidance", False) or hasattr(pipe, "pag_applied_layers"):
        raise ValueError("perturbed attention mixes rows in the network: leave out network_batch_size")
    with ExitStack() as undo:
        for module in denoisers(pipe):
            undo.callback(wrap_forward(module, _in_slices(rows)))
        yield


def _in_slices(rows: int) -> Callable[..., Any]:
    """Return what stands around a forward so that it takes so many rows at a time."""

    def around(whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        n = _rows(args, kwargs)
        if n <= rows:
            return whole(*args, **kwargs)
        parts = []
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            some = {k: v if k in _SHARED else _cut(v, part, n) for k, v in kwargs.items()}
            parts.append(whole(*[_cut(value, part, n) for value in args], **some))
        return _joined(parts)

    return around


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many rows a call has: those of its first argument that is a batch."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return 0


def _cut(value: Any, part: slice, n: int) -> Any:
    """Return the rows of an argument, tensors with n of them at any depth; anything else as it is."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == n else value
    if isinstance(value, list) and len(value) == n and all(isinstance(item, Tensor) for item in value):
        return value[part]
    if type(value) in (list, tuple):
        return type(value)(_cut(item, part, n) for item in value)
    return {k: _cut(v, part, n) for k, v in value.items()} if type(value) is dict else value


def _joined(parts: list[Any]) -> Any:
    """Return one output with the rows of all."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if type(first) is list:
        return [row for part in parts for row in part]
    if isinstance(first, tuple):
        return tuple(_joined(list(items)) for items in zip(*parts, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        names = [entry.name for entry in fields(first) if getattr(first, entry.name) is not None]
        return type(first)(**{name: _joined([getattr(part, name) for part in parts]) for name in names})
    return first
