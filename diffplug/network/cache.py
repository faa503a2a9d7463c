"""A denoiser that evaluates the same input once.

A search runs one pipeline again and again with solvers that differ from some step on. Up to there the network
is shown the same tensors, bit for bit, and what it said is remembered: a candidate costs only the evaluations
that are new. This works for every pipeline, whatever it does between network and solver.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from diffplug.network.denoiser import denoisers, wrap_forward

__all__ = ["NetworkCache", "digest", "remember"]


@dataclass
class NetworkCache:
    """`evaluated` and `recalled` network calls; `size`: bytes of outputs kept; the oldest go above `limit`.

    on_evaluation: told every evaluation that is not recalled.
    """

    limit: int = 2**30
    evaluated: int = 0
    recalled: int = 0
    size: int = 0
    on_evaluation: Callable[[], None] | None = None
    _kept: OrderedDict[bytes, tuple[Any, int]] = field(default_factory=OrderedDict, repr=False)

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `forward` returns for these arguments, computed at most once while it is kept."""

        def counted() -> Any:
            self.evaluated += 1
            if self.on_evaluation is not None:
                self.on_evaluation()
            return forward(*args, **kwargs)

        key = digest((id(forward), args, kwargs))
        self.recalled += key in self._kept
        return self._known(key, counted)

    def text(self, encode: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for a text encoder, which is not counted."""
        return self._known(digest((id(encode), args, kwargs)), lambda: encode(*args, **kwargs))

    def _known(self, key: bytes, make: Callable[[], Any]) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return copy.deepcopy(self._kept[key][0])
        output = make()
        self._keep(key, copy.deepcopy(output))
        return output

    def _keep(self, key: bytes, output: Any) -> None:
        size = sum(t.numel() * t.element_size() for t in _tensors(output))
        self._kept[key] = output, size
        self.size += size
        while self.size > self.limit and len(self._kept) > 1:
            self.size -= self._kept.popitem(last=False)[1][1]


@contextmanager
def remember(pipe: Any, limit: int = 2**30) -> Iterator[NetworkCache]:
    """Inside the block the denoisers of `pipe`, and its text encoding, recall outputs for inputs seen before.

    limit: bytes of outputs to keep. The weights must not change inside the block, and no gradient flows.
    Raises ValueError for a pipeline in which no denoiser is found.
    """
    cache = NetworkCache(limit)
    with ExitStack() as undo:
        for module in denoisers(pipe):
            undo.callback(wrap_forward(module, _recalled(cache)))
        undo.callback(_remember_prompts(pipe, cache))
        yield cache


def _remember_prompts(pipe: Any, cache: NetworkCache) -> Callable[[], None]:
    """Put the cache before a pipeline's `encode_prompt`, if it has one; returns what takes it away again."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None or "encode_prompt" in vars(pipe):
        return lambda: None

    def remembered(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return cache.text(encode, args, kwargs)

    pipe.encode_prompt = remembered
    return lambda: delattr(pipe, "encode_prompt")


def _recalled(cache: NetworkCache) -> Callable[..., Any]:
    """Return what stands around a forward so that the cache answers for it."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return cache.call(forward, args, kwargs)

    return around


def digest(value: Any) -> bytes:
    """A hash of nested arguments: of the bytes of tensors, of the text of everything else."""
    state = hashlib.sha256()
    _update(state, value)
    return state.digest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}{value.device}".encode())
        flat = value.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
        state.update(flat.view(torch.uint8).cpu().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _update(state, (str(key), value[key]))
    elif isinstance(value, (list, tuple)):
        state.update(f"[{len(value)}".encode())
        for item in value:
            _update(state, item)
    else:
        state.update(repr(value).encode())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for item in items for tensor in _tensors(item)]
