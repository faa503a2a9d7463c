"""The denoiser in bfloat16, its weights and what it returns in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["autocast", "keep_single"]


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


@contextmanager
def keep_single(denoiser: Any) -> Iterator[None]:
    """A block with group norms and the softmax of attention in float32.

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
    hooks = [part.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(),)) for part in norms]
    try:
        yield
    finally:
        if plain:
            denoiser.set_attn_processor(stock)
        for hook in hooks:
            hook.remove()
