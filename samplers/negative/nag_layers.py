"""Guidance inside cross-attention: a layer attends to the negative prompt first, then to the prompt.

What attention gave, heads merged, is read where it enters the output projection. So this works with every
attention processor (xFormers, slicing, IP-Adapter, LoRA), and none is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import undo_all
from diffplug.network.denoiser import wrap_forward
from diffplug.samplers.negative.cross_attention import cross_attentions, output_projection, unwrapped
from diffplug.samplers.negative.network import watch_network
from diffplug.samplers.negative.state import NegativeState

__all__ = ["guide_cross"]

Formula = Callable[[Tensor, Tensor, Any], Tensor]


def guide_cross(
    pipe: Any, network: Any, state: NegativeState, options: Any, formula: Formula
) -> Callable[[], None]:
    """Let cross-attention layers of a network be guided by `formula` while `state` has a text; return the
    undo.

    formula(Z+, Z-, options): merged heads [n, tokens, channels].
    """
    undos = [watch_network(pipe, network, state, until=options.until)]
    for layer in cross_attentions(unwrapped(network)).values():
        guided = _Guided(layer, state, lambda a, b: formula(a, b, options))
        undos.append(output_projection(layer).register_forward_pre_hook(guided.at_output).remove)
        undos.append(wrap_forward(layer, guided))
    return undo_all(undos)


class _Guided:
    """One layer: its attention to the negative prompt is kept, that to the prompt is guided away from it."""

    def __init__(self, layer: Any, state: NegativeState, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.layer, self.state, self.formula = layer, state, formula
        self.keeping = False
        self.kept: Tensor | None = None

    def __call__(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.state.text is None:
            return forward(hidden, *args, **kwargs)
        told = (
            dict(zip(("encoder_hidden_states", "attention_mask", "rotary_emb"), args, strict=False)) | kwargs
        )
        text = told["encoder_hidden_states"]
        self.keeping = True
        try:
            forward(
                hidden,
                **{**told, "encoder_hidden_states": self._negative(text), "attention_mask": self.state.bias},
            )
        finally:
            self.keeping = False
        try:
            return forward(hidden, **told)
        finally:
            self.kept = None

    def _negative(self, text: Any) -> Any:
        """Return the negative prompt in the form of the layer's own text: behind a picture's tokens, or
        beside them.
        """
        negative = self.state.shown_with(text[0] if isinstance(text, tuple) else text)[0]
        if isinstance(text, tuple):  # IP-Adapter
            return (negative, *text[1:])
        pictures = text.shape[1] - self.state.positive_tokens
        if pictures <= 0 or negative is None:
            return negative
        return torch.cat([text[:, :pictures], negative], 1)

    def at_output(self, projection: Any, args: tuple[Any, ...]) -> Any:
        if self.state.text is None:
            return None
        if self.keeping:
            self.kept = args[0]
            return None
        if self.kept is None:
            return None
        self.state.acted = True
        return (self.formula(args[0], self.kept), *args[1:])
