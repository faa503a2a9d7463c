"""Encodings of prompts, each made once: what a text encoder says of a row of tokens is kept and given again.

Every row is encoded alone, so its encoding depends on nothing but its tokens: not on its neighbours in a
call, and not on what was encoded before. Pictures are the same whether an encoding was there or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffplug.network.denoiser import wrap_forward

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PromptEncodings", "text_encoders"]

_NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_CACHES = ("past_key_values", "cache")
_MOST_BYTES = 512 * 2**20


class PromptEncodings:
    """Encodings by encoder and row of tokens; the longest unused ones go when `most_bytes` are exceeded.

    Only calls whose tensors are rows of whole numbers (tokens, masks) are kept, and only where every tensor
    of the answer has a row for each of them; other calls go through. Empty it with `clear` when the encoders
    change, as by an adapter.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.hits = self.encoded = 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    @contextmanager
    def on(self, pipe: Any) -> Iterator[PromptEncodings]:
        """Have the text encoders of a pipeline encode each prompt once while the block runs."""
        with ExitStack() as undone:
            for name, encoder in text_encoders(pipe).items():
                undone.callback(wrap_forward(encoder, self._around(name)))
            yield self

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._bytes = 0

    def _around(self, name: str) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            rows = _rows(args, kwargs)
            if rows is None:
                return forward(*args, **kwargs)
            found = [self._row(name, forward, *row) for row in rows]
            if any(one is None for one in found):
                return forward(*args, **kwargs)
            return _joined(found)

        return around

    def _row(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the encoding of one row; None where the encoder does not answer in rows."""
        key = (name, _key(args), _key(kwargs))
        if key in self._kept:
            self._kept.move_to_end(key)
            self.hits += 1
            return self._kept[key][0]
        value = _without_cache(forward(*args, **kwargs))
        size = _size(value)
        if size is None:
            return None
        self.encoded += 1
        self._kept[key] = (value, size)
        self._bytes += size
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            _, (_, gone) = self._kept.popitem(last=False)
            self._bytes -= gone
        return value


def text_encoders(pipe: Any) -> dict[str, Any]:
    """Return the text encoders of a pipeline by the names of its components."""
    found = {name: getattr(pipe, name, None) for name in _NAMES}
    return {name: module for name, module in found.items() if hasattr(module, "register_forward_pre_hook")}


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]] | None:
    """Return the arguments of a call for each of its rows; None where they are not all rows of whole numbers.

    None too where gradients are wanted: what is kept has none.
    """
    import torch

    given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
    lengths = {len(one) if one.ndim else 0 for one in given}
    whole = all(not one.is_floating_point() and not one.is_complex() and one.ndim == 2 for one in given)
    plain = all(
        one is None or isinstance(one, (bool, int, float, str, torch.Tensor))
        for one in (*args, *kwargs.values())
    )
    if not given or len(lengths) > 1 or not whole or not plain or torch.is_grad_enabled():
        return None
    cut = lambda one, i: one[i : i + 1] if isinstance(one, torch.Tensor) else one  # noqa: E731
    return [
        (tuple(cut(one, i) for one in args), {name: cut(one, i) for name, one in kwargs.items()})
        for i in range(lengths.pop())
    ]


def _without_cache(value: Any) -> Any:
    """Return an answer without the keys and values that a language model would go on writing from."""
    if isinstance(value, Mapping) and any(value.get(name) is not None for name in _CACHES):
        return type(value)(**{name: one for name, one in value.items() if name not in _CACHES})
    return value


def _key(given: Any) -> tuple[Any, ...]:
    """Return what tells the arguments of a row apart."""
    import torch

    items = sorted(given.items()) if isinstance(given, Mapping) else enumerate(given)
    return tuple(
        (name, tuple(one.flatten().tolist()) if isinstance(one, torch.Tensor) else one) for name, one in items
    )


def _size(value: Any) -> int | None:
    """Return the bytes of an answer; None where it is not made of tensors of one row."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.element_size() * value.nelement() if value.ndim and len(value) == 1 else None
    if isinstance(value, Mapping) or type(value) in (tuple, list):
        sizes = [_size(one) for one in (value.values() if isinstance(value, Mapping) else value)]
        return None if any(size is None for size in sizes) else sum(size for size in sizes if size)
    return 0 if value is None else None


def _joined(values: list[Any]) -> Any:
    """Return the answer of a call from those of its rows."""
    import torch

    first = values[0]
    if isinstance(first, torch.Tensor):
        rows: list[Tensor] = values
        return torch.cat(rows)
    if isinstance(first, Mapping):
        return type(first)(**{name: _joined([one[name] for one in values]) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(parts)) for parts in zip(*values, strict=True))
    return first
