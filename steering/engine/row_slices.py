"""The denoiser and the decoder on a few rows at a time, for particles that do not fit into memory at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.network.call_rows import SHARED, cut_rows, rows_of
from diffplug.network.denoiser import denoisers, wrap_forward


@contextmanager
def sliced_network(pipe: Any, rows: int | None) -> Iterator[None]:
    """Let the denoisers of a pipeline take at most so many rows at a time while the block runs; None: all.

    Where memory runs out, denoisers and the decoder of the finished pictures take half as many rows from
    there on, down to one. Every row goes through a network alone in either case, so that results differ by
    rounding at most. Raises ValueError for guidance that mixes rows inside the network (perturbed attention).
    """
    mixes = getattr(pipe, "do_perturbed_attention_guidance", False) or hasattr(pipe, "pag_applied_layers")
    if mixes and rows is not None:
        raise ValueError("perturbed attention mixes rows in the network: leave out network_batch_size")
    with ExitStack() as undo:
        if not mixes:
            for module in _known_denoisers(pipe, needed=rows is not None):
                undo.callback(wrap_forward(module, Portions(rows)))
        undo.callback(_wrap_decode(getattr(pipe, "vae", None)))
        yield


def _known_denoisers(pipe: Any, *, needed: bool) -> list[Any]:
    """Return the denoisers of a pipeline; none where they are not known and not needed."""
    try:
        return denoisers(pipe)
    except ValueError:
        if needed:
            raise
        return []


def _wrap_decode(decoder: Any) -> Callable[[], None]:
    """Make a decoder take fewer rows where memory runs out; return the function that undoes it.

    One that reads how many frames its rows are cannot be cut.
    """
    decode = getattr(decoder, "decode", None)
    if not callable(decode) or "num_frames" in inspect.signature(decode).parameters:
        return lambda: None
    own, portions = vars(decoder).get("decode"), Portions(None)
    vars(decoder)["decode"] = lambda *args, **kwargs: portions(decode, *args, **kwargs)

    def undo() -> None:
        if own is None:
            vars(decoder).pop("decode", None)
        else:
            vars(decoder)["decode"] = own

    return undo


class Portions:
    """Stands around a forward so that it takes at most `limit` rows, and half as many out of memory."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def __call__(self, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `whole` gives for all rows."""
        if self.limit is None:
            try:
                return whole(*args, **kwargs)
            except torch.OutOfMemoryError:
                self._halve(rows_of(args, kwargs))
        n, start = rows_of(args, kwargs), 0
        parts: list[Any] = []
        while start < n or not parts:
            limit = n if self.limit is None else self.limit
            try:
                parts.append(_of_rows(whole, args, kwargs, slice(start, start + limit), n))
            except torch.OutOfMemoryError:
                self._halve(min(limit, n))
                continue
            start += max(limit, 1)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _halve(self, rows: int) -> None:
        """Take half as many rows from now on; for a single one raise the error that is being handled."""
        if rows <= 1:
            raise  # the error that is being handled
        self.limit = -(-rows // 2)
        torch.cuda.empty_cache()  # does nothing without CUDA


def _of_rows(
    whole: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], part: slice, n: int
) -> Any:
    """Return what a forward gives for some rows of n."""
    if part.start == 0 and part.stop >= n:
        return whole(*args, **kwargs)
    some = {k: v if k in SHARED else cut_rows(v, part, n) for k, v in kwargs.items()}
    return whole(*[cut_rows(value, part, n) for value in args], **some)


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
