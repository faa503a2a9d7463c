"""Rewards that are networks: loaded at the first call, shared, run in batches, with or without a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

__all__ = ["NetworkReward", "TextFeatures", "in_batches", "on_cpu"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LOADING = threading.RLock()


class _Loaded:
    """A network that is built when it is first needed, and then stays."""

    def __init__(
        self, load: Callable[..., nn.Module], arguments: tuple[Any, ...], dtype: torch.dtype
    ) -> None:
        self.load, self.arguments, self.dtype = load, arguments, dtype
        self.network: nn.Module | None = None

    def on(self, device: torch.device) -> nn.Module:
        # tensors made in inference mode could never be part of a graph later
        with _LOADING, torch.inference_mode(False):
            if self.network is None:
                self.network = self.load(*self.arguments).to(self.dtype).eval().requires_grad_(False)
            return self.network.to(device)


_SHARED: WeakValueDictionary[tuple[Any, ...], _Loaded] = WeakValueDictionary()
"""Networks that some reward still holds: two rewards of the same settings are one copy in memory."""


class NetworkReward:
    """A reward that a network gives; subclasses say how to load it.

    The network follows the device of the pictures. Gradients flow to the pictures where they require them
    and gradients are enabled; its own weights never get any. Out of memory, half as many are tried again.

    Args:
        load: a function that builds the network, called as `load(*arguments)` at the first score. A network
        is called as `network(images, prompts) -> [n]`. batch: pictures in one pass. dtype: float32, float16
        or bfloat16.
    """

    differentiable = True

    def __init__(
        self,
        load: Callable[..., nn.Module],
        *arguments: Any,
        batch: int = 16,
        dtype: str = "float32",
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}: it must be at least 1")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}: take one of {', '.join(_DTYPES)}")
        self.batch, self.dtype = batch, dtype
        key = (load, arguments, dtype)
        with _LOADING:
            self._loaded = _SHARED.get(key) or _Loaded(load, arguments, _DTYPES[dtype])
            _SHARED[key] = self._loaded

    def network(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network on that device, loaded now if it is not yet."""
        return self._loaded.on(torch.device(device))

    def prepare(self) -> None:
        """Load the network now, so that bad weights are told before anybody has worked for their scores."""
        self.network()

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64, on the CPU, of pictures [n, 3, h, w] in [0, 1] for n prompts."""
        _check(images, prompts)
        network = self.network(images.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            return on_cpu(in_batches(network, images, list(prompts), self.batch))


def on_cpu(scores: Tensor) -> Tensor:
    """Scores as float64 on the CPU (some devices have no float64), their graph kept."""
    return scores.to("cpu").to(torch.float64)


def in_batches(
    network: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str], batch: int
) -> Tensor:
    """What `network` gives for a few pictures at a time, put together."""
    done: list[Tensor] = []
    start = 0
    while start < len(images):
        part = slice(start, start + batch)
        try:
            done.append(network(images[part], prompts[part]))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = -(-batch // 2)
            continue
        start += batch
    return torch.cat(done) if done else images.new_zeros(0)


def _check(images: Tensor, prompts: list[str]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be floats [n, 3, h, w] in [0, 1], got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for each image")


class TextFeatures:
    """Features of prompts from a text encoder, each prompt encoded once and kept, up to `keep` of them.

    Args:
        encode: prompts to features [n, d]; it gets at most `batch` at a time.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], *, keep: int = 4096, batch: int = 64) -> None:
        self.encode, self.keep, self.batch = encode, keep, batch
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: list[str], device: torch.device) -> Tensor:
        """Features [n, d] float32 of n prompts."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        found = {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(fresh), self.batch):
                part = fresh[start : start + self.batch]
                found |= zip(part, self.encode(part).float().unbind(), strict=True)
        self._remember(found)
        return torch.stack([found[prompt].to(device) for prompt in prompts])

    def _remember(self, found: dict[str, Tensor]) -> None:
        for prompt, features in found.items():
            self._known[prompt] = features
            self._known.move_to_end(prompt)
        while len(self._known) > self.keep:
            self._known.popitem(last=False)
