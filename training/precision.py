"""The denoiser in bfloat16, its weights and what it returns in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from diffplug.training.tuners.lora import ADAPTER

__all__ = ["any_precision", "autocast", "keep_single"]


@contextmanager
def autocast(denoiser: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A block in which the denoiser computes in `dtype` and returns float32; None changes nothing.

    On a CPU, group norms and the softmax of attention stay in float32 (see `keep_single`).
    """
    if dtype is None:
        yield
        return
    device = next(denoiser.parameters()).device.type
    with ExitStack() as changes:
        own, forward = vars(denoiser).get("forward"), denoiser.forward

        def narrow(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, dtype):
                out = forward(*args, **kwargs)
            if isinstance(out, tuple):
                return (out[0].float(), *out[1:])
            out[0] = out[0].float()
            return out

        if device == "cpu":
            changes.enter_context(keep_single(denoiser))
        denoiser.forward = narrow
        changes.callback(_restore, denoiser, own)
        yield


def _restore(denoiser: nn.Module, own: Any) -> None:
    if own is None:
        del denoiser.forward
    else:
        denoiser.forward = own


def any_precision(denoiser: nn.Module) -> None:
    """Let a denoiser take states in any precision, and answer in that of the state; for good.

    Training works in float32 on a network that may be loaded in half precision, and a pipeline in half
    precision on a denoiser whose weights are float32 where all of them learn.
    """
    given: list[torch.dtype] = []

    def before(_: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> Any:
        own = _precision(denoiser)
        state = next(v for v in (*words, *named.values()) if isinstance(v, torch.Tensor))
        given.append(state.dtype)
        return _cast(words, own), _cast(named, own)

    def after(_: nn.Module, words: Any, named: Any, out: Any) -> Any:
        wanted = given.pop()
        if isinstance(out, tuple):
            return (out[0].to(wanted), *out[1:])
        out[0] = out[0].to(wanted)
        return out

    denoiser.register_forward_pre_hook(before, with_kwargs=True)
    denoiser.register_forward_hook(after, with_kwargs=True)


def _precision(denoiser: nn.Module) -> torch.dtype:
    """Return the precision of a denoiser's own weights; adapters are float32 whatever it is."""
    own = [
        value.dtype
        for name, value in denoiser.named_parameters()
        if f".{ADAPTER}." not in f"{name}." and value.is_floating_point()
    ]
    return max(set(own), key=own.count)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, dict):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    return type(value)(_cast(inner, dtype) for inner in value) if isinstance(value, (tuple, list)) else value


@contextmanager
def keep_single(denoiser: Any) -> Iterator[None]:
    """A block with group norms of float32 weights and the softmax of attention in float32.

    Their bfloat16 kernels are several times slower on a CPU: a step of 64 Shapes latents takes .76 s with
    this and 1.83 s without.
    """
    from diffusers.models.attention_processor import AttnProcessor

    stock = getattr(denoiser, "attn_processors", None) if hasattr(denoiser, "set_attn_processor") else None
    plain = stock is not None and all(
        type(p).__name__ in ("AttnProcessor", "AttnProcessor2_0") for p in stock.values()
    )
    if plain:
        denoiser.set_attn_processor(AttnProcessor())
    norms = [part for part in denoiser.modules() if isinstance(part, nn.GroupNorm)]
    hooks = [part.register_forward_pre_hook(_as_its_weights) for part in norms]
    try:
        yield
    finally:
        if plain:
            denoiser.set_attn_processor(stock)
        for hook in hooks:
            hook.remove()


def _as_its_weights(norm: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a norm's argument in the precision of its weights."""
    weight: Any = norm.weight
    return (arguments[0].float() if weight is None else arguments[0].to(weight.dtype),)
