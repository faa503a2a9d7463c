"""SpeedUpNet's layers: a cross-attention layer that reads the negative prompt too (arXiv 2312.08887).

    released   Z = A - (a- * A- + b-) + (a+ * A+ + b+)    A+- scaled to the norm of A; then the base's output
               layer. Guidance scale baked in.
    tied       out = base + s (w - 1) (g(w, t) * [A'(c+) - A'(c-)]) W_O'

A is the base's attention with merged heads, A', A+, A- are attention by the adapter's own projections. The
tied form is ours. It is exact by construction: out = base where c- = c+, where w = 1 and where s = 0, and
one row never depends on another. Its gate g takes the place of the offset's size, which changes with
guidance scale and noise; it starts at zero, so that training starts from the unguided model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffplug.samplers.negative.cross_attention import output_projection

__all__ = ["FEATURES", "LayerShape", "ReleasedLayer", "TiedLayer", "features"]

_FREQUENCIES = 8
FEATURES = 3 + 2 * _FREQUENCIES
"""Numbers that a gate is told: log w, t, t^2 and sines and cosines of t."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a cross-attention layer: `width` of the picture's tokens, `inner` of all heads, `text`,
    `heads`.
    """

    width: int
    inner: int
    text: int
    heads: int

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """Return the sizes of a layer of Diffusers."""
        inner, width = layer.to_q.weight.shape
        return cls(int(width), int(inner), int(layer.to_k.weight.shape[1]), int(layer.heads))


def features(guidance: Tensor, time: Tensor) -> Tensor:
    """Return what gates are told of guidance scales w [n] and times t / T [n]: [n, 19] float32."""
    u = time.float()
    phases = u[:, None] * (math.pi * 2.0 ** torch.arange(_FREQUENCIES, device=u.device) / 2)
    logs = guidance.float().clamp(min=1e-3).log()
    return torch.cat([torch.stack([logs, u, u * u], 1), phases.sin(), phases.cos()], 1)


class TiedLayer(nn.Module):
    """One branch for both prompts. full: with queries and an output layer of its own, else those of the
    base.
    """

    def __init__(self, shape: LayerShape, *, full: bool = True, gate: int = 64) -> None:
        super().__init__()
        self.shape, self.full = shape, full
        self.to_k = nn.Linear(shape.text, shape.inner, bias=False)
        self.to_v = nn.Linear(shape.text, shape.inner, bias=False)
        if full:
            self.to_q = nn.Linear(shape.width, shape.inner, bias=False)
            self.to_out = nn.Linear(shape.inner, shape.width, bias=False)
        last = nn.Linear(gate, shape.inner)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(FEATURES, gate), nn.SiLU(), last)
        self._known: tuple[Any, ...] = ()

    @torch.no_grad()
    def copy_base(self, layer: Any) -> None:
        """Start from the projections of the layer that this one stands beside."""
        self.to_k.weight.copy_(layer.to_k.weight)
        self.to_v.weight.copy_(layer.to_v.weight)
        if self.full:
            self.to_q.weight.copy_(layer.to_q.weight)
            self.to_out.weight.copy_(output_projection(layer).weight)

    def forward(
        self,
        layer: Any,
        hidden: Tensor,
        positive: Tensor,
        negative: Tensor,
        told: Tensor,
        biases: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """Return g * [A'(c+) - A'(c-)] W_O', [n, tokens, width]: the offset of one unit of w - 1.

        layer: the base's. hidden: [n, tokens, width]. positive, negative: [n, length, text], of any two
        lengths. told: `features`. biases: added to the logits of either, [n, 1, length].
        """
        query = self._heads(self.to_q(hidden) if self.full else layer.to_q(hidden))
        (k_pos, v_pos), (k_neg, v_neg) = self._keys(positive, negative)
        difference = _attend(query, k_pos, v_pos, biases[0]) - _attend(query, k_neg, v_neg, biases[1])
        gated = self.gate(told.to(self.to_k.weight.dtype))[:, None] * difference.to(hidden.dtype)
        return self.to_out(gated) if self.full else F.linear(gated, output_projection(layer).weight)

    def _keys(
        self, positive: Tensor, negative: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return keys and values of both prompts; kept from step to step while neither prompt changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._projected(positive), self._projected(negative)
        version = self.to_k.weight._version
        known = self._known
        if not known or known[0] is not positive or known[1] is not negative or known[2] != version:
            self._known = known = (
                positive,
                negative,
                version,
                self._projected(positive),
                self._projected(negative),
            )
        return known[3], known[4]

    def _projected(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.to_k(text)), self._heads(self.to_v(text))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)


class ReleasedLayer(nn.Module):
    """The layer of the public file for Stable Diffusion 1.5: guidance scale and strength are baked in.

    positive: whether there is a second branch for the prompt. norm: "sample" scales every picture's
    branches by its own norms; "tensor" by those of the whole batch, as the published code does, so that a
    picture depends on what it is drawn with.
    """

    def __init__(self, shape: LayerShape, *, positive: bool = True, norm: str = "sample") -> None:
        super().__init__()
        self.shape, self.norm = shape, norm
        self.negative = _Branch(shape)
        self.positive = _Branch(shape) if positive else None

    def forward(
        self, layer: Any, hidden: Tensor, merged: Tensor, positive: Tensor, negative: Tensor
    ) -> Tensor:
        """Return Z [n, tokens, inner] in place of the base's merged heads A, `merged`."""
        query = layer.to_q(hidden).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
        z = merged - self.negative(query, negative, merged, self.norm)
        return z if self.positive is None else z + self.positive(query, positive, merged, self.norm)


class _Branch(nn.Module):
    """Attention to a prompt by own keys and values, scaled to the base's norm, times `alpha` plus `beta`."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.to_k = nn.Linear(shape.text, shape.inner, bias=False)
        self.to_v = nn.Linear(shape.text, shape.inner, bias=False)
        self.alpha = nn.Parameter(torch.ones(shape.inner))
        self.beta = nn.Parameter(torch.zeros(shape.inner))

    def forward(self, query: Tensor, text: Tensor, like: Tensor, norm: str) -> Tensor:
        keys, values = (
            linear(text).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.to_k, self.to_v)
        )
        attended = _attend(query, keys, values, None).to(like.dtype)
        return self.alpha * attended * _ratio(like, attended, norm) + self.beta


def _ratio(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """Return |a| / |b|, one number for each row ("sample") or for all ("tensor")."""
    axes = (1, 2) if norm == "sample" else (0, 1, 2)
    sizes = [torch.linalg.vector_norm(x.float(), dim=axes, keepdim=True) for x in (a, b)]
    return (sizes[0] / sizes[1].clamp(min=1e-12)).to(a.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention with merged heads, [n, tokens, inner]."""
    if query.device.type == "cpu":  # the bfloat16 kernel takes twice as long there
        query, keys, values = query.float(), keys.float(), values.float()
    mask = None if bias is None else bias[:, None].to(query.dtype)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
