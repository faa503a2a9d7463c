"""Around a denoiser's forward: which negative prompt each of its rows has, and whether it acts at this
noise level.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.network.denoiser import wrap_forward
from diffplug.samplers.negative.call import check_unguided
from diffplug.samplers.negative.cross_attention import attention_bias, projected_text, unwrapped
from diffplug.samplers.negative.state import Encoded, NegativeState

__all__ = ["arguments_by_name", "compiled_anew", "noise_time", "watch_network"]

_TOLD_SIGMA = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel")


def watch_network(pipe: Any, network: Any, state: NegativeState, *, until: float = 0.0) -> Callable[[], None]:
    """Leave text, bias and time of every call of a cross-attention denoiser in `state`; return the undo.

    until: noise level below which the negative prompt is off.
    """
    known: list[Any] = [None, None, None]

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not state.ready():
            return forward(*args, **kwargs)
        check_unguided(pipe)
        state.same.check(pipe)
        told = arguments_by_name(network, args, kwargs)
        time = noise_time(network, told["timestep"])
        if until > 0 and float(time.max()) < until:
            return forward(*args, **kwargs)
        shown = told["encoder_hidden_states"]
        negative = state.aligned(len(shown), shown)
        if known[0] is not negative:
            known[:] = [negative, *_prepared(network, negative, shown)]
        state.text, state.bias = known[1], known[2]
        state.positive_tokens, state.tried = shown.shape[1], True
        state.time = time.expand(len(shown)) if len(time) == 1 else time
        try:
            return forward(*args, **kwargs)
        finally:
            state.text = state.bias = state.time = None

    undos = [compiled_anew(network), wrap_forward(network, torch.compiler.disable(around, recursive=False))]

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def compiled_anew(network: Any) -> Callable[[], None]:
    """Have a compiled network traced again, now and when the returned function is called.

    Compiled code does not notice hooks that come or go.
    """
    parts = unwrapped(network).modules()
    in_place = any(part._compiled_call_impl is not None for part in parts)
    if not in_place and network is unwrapped(network):
        return lambda: None
    torch.compiler.reset()
    return torch.compiler.reset


def _prepared(network: Any, negative: Encoded, shown: Tensor) -> tuple[Tensor, Tensor | None]:
    text = projected_text(network, negative.text.to(shown.device, shown.dtype))
    mask = None if negative.mask is None else negative.mask.to(shown.device)
    return text, attention_bias(mask, text)


def noise_time(network: Any, timestep: Any) -> Tensor:
    """Return the noise level [n] from 1 (pure noise) to 0 that a network is told, on its device.

    Timesteps token by token [n, tokens], as of known frames (Wan 2.2 TI2V, LTX from a picture), count as
    the highest of their row.
    """
    told = torch.as_tensor(timestep).detach().float()
    told = told.flatten(1).amax(1) if told.ndim > 1 else told.flatten()
    name = original_class(unwrapped(network)).__name__
    if name == "ZImageTransformer2DModel":
        return 1 - told
    return told if name in _TOLD_SIGMA else told / 1000


def arguments_by_name(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a denoiser's forward by name."""
    model = unwrapped(network)
    signature = inspect.signature(original_class(model).forward)
    bound = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    bound.pop("self", None)
    return bound | bound.pop("kwargs", {})
