"""SpeedUpNet's adapter as one module beside a denoiser: its layers by name, what it was made for, how it is
put on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.checks import check_keys
from diffplug.samplers.negative.cross_attention import cross_attentions, output_projection, unwrapped
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_layers import LayerShape, ReleasedLayer, TiedLayer, features

__all__ = ["LAYOUTS", "AdapterMeta", "SunAdapter", "put_on"]

LAYOUTS = ("large", "small", "v1")


@dataclass(frozen=True, kw_only=True)
class AdapterMeta:
    """What an adapter was made for.

    layout: "large" and "small" are tied (`TiedLayer`), "v1" is the released form. guidance: the scale at
    which it is used where none is asked for; guidance_range: those it was trained on, or one baked-in scale
    twice. steps: evaluations it was trained for, empty for any. empty: what a call without a negative
    prompt gets, "adapter" or "off". model, architecture: fingerprints of the base. figures: measured ones.
    """

    layout: str = "large"
    family: str = "unknown"
    prediction_type: str = "epsilon"
    guidance: float = 5.0
    guidance_range: tuple[float, float] = (1.0, 8.0)
    steps: tuple[int, ...] = ()
    empty: str = "adapter"
    model: str | None = None
    architecture: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, allowed are {', '.join(map(repr, LAYOUTS))}")
        if self.empty not in ("adapter", "off"):
            raise ValueError(f"empty is {self.empty!r}, allowed are 'adapter' and 'off'")

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> AdapterMeta:
        """Return what `to_json` wrote; ValueError for unknown keys."""
        check_keys("SpeedUpNet adapter", document, [*cls.__dataclass_fields__])
        told: dict[str, Any] = dict(document)
        for name in {"guidance_range", "steps"} & told.keys():
            told[name] = tuple(told[name])
        return cls(**told)


class SunAdapter(nn.Module):
    """Layers by the names of the denoiser's cross-attention layers, and `meta`.

    Make one with `SunAdapter.beside(denoiser)`, or read one with `load_adapter`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], meta: AdapterMeta) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
        self.meta = meta

    @classmethod
    def beside(cls, denoiser: Any, meta: AdapterMeta | None = None, *, gate: int = 64) -> SunAdapter:
        """Return an untrained adapter for a denoiser: it does nothing yet. gate: width of the gates.

        Raises ValueError for a denoiser without cross-attention layers.
        """
        meta = meta or AdapterMeta()
        found = cross_attentions(denoiser)
        if not found:
            raise ValueError(
                f"{type(unwrapped(denoiser)).__name__} has no cross-attention layers, which SpeedUpNet "
                "works on: "
                "take NAG, which knows joint attention"
            )
        layers: dict[str, nn.Module] = {}
        for name, base in found.items():
            if meta.layout == "v1":
                layers[name] = ReleasedLayer(LayerShape.of(base))
                continue
            layer = TiedLayer(LayerShape.of(base), full=meta.layout == "large", gate=gate)
            layer.copy_base(base)
            layers[name] = layer
        return cls(layers, meta)

    @property
    def tied(self) -> bool:
        """Whether it takes a guidance scale, and is the base exactly where there is nothing to do."""
        return self.meta.layout != "v1"

    def named_layers(self) -> dict[str, Any]:
        """Return the layers by the names that the denoiser has for them."""
        return {name.replace("/", "."): layer for name, layer in self.layers.items()}

    def check_fits(self, denoiser: Any) -> None:
        """Raise ValueError, naming the first layer that is missing or has another size."""
        there = cross_attentions(denoiser)
        for name, layer in self.named_layers().items():
            if name not in there:
                raise ValueError(
                    f"the adapter has a layer {name!r}, which this {type(unwrapped(denoiser)).__name__} "
                    "has not: it "
                    "belongs to another base"
                )
            own, base = layer.shape, LayerShape.of(there[name])
            if own != base:
                raise ValueError(
                    f"the adapter's layer {name!r} is for {own.text} text channels and width {own.width}, "
                    "this "
                    f"denoiser has {base.text} and {base.width}: it belongs to another base"
                )
        if left := [name for name in there if name not in self.named_layers()]:
            raise ValueError(f"the adapter has nothing for the layer {left[0]!r}: it belongs to another base")


def put_on(
    adapter: SunAdapter, denoiser: Any, state: NegativeState, strength: float = 1.0
) -> Callable[[], None]:
    """Let an adapter act in a denoiser wherever `state` says so; return the function that takes it off.

    The base's own layers, processors and weights stay untouched: the tied form adds to the output of a layer,
    the released one changes what enters its output projection.
    """
    adapter.check_fits(denoiser)
    there, hooks = cross_attentions(denoiser), []
    for name, layer in adapter.named_layers().items():
        if isinstance(layer, TiedLayer):
            add = _Adding(layer, state, strength)
            hooks.append(there[name].register_forward_hook(add, with_kwargs=True))
        else:
            change = _Changing(layer, there[name], state)
            hooks.append(there[name].register_forward_pre_hook(change.seen, with_kwargs=True))
            hooks.append(output_projection(there[name]).register_forward_pre_hook(change))

    def undo() -> None:
        while hooks:
            hooks.pop().remove()

    return undo


class _Adding:
    """Adds a tied layer's offset to what a cross-attention layer returns."""

    def __init__(self, layer: TiedLayer, state: NegativeState, strength: float) -> None:
        self.layer, self.state, self.strength = layer, state, strength

    def __call__(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        state = self.state
        if state.text is None:
            return out
        hidden, text, bias = _arguments(args, kwargs)
        negative, time = state.shown_with(text)
        if negative is None or time is None:
            return out
        w = torch.as_tensor(state.guidance, dtype=torch.float32, device=out.device).expand(len(hidden))
        offset = self.layer(base, hidden, text, negative, features(w, time), (bias, state.bias))
        size = self.strength * (w - 1) / getattr(base, "rescale_output_factor", 1.0)
        return out + size.to(out.dtype)[:, None, None] * offset.to(out.dtype)


class _Changing:
    """Replaces the merged heads of a cross-attention layer by those of a released layer."""

    def __init__(self, layer: nn.Module, base: Any, state: NegativeState) -> None:
        self.layer, self.base, self.state = layer, base, state
        self.hidden: Any = None
        self.text: Any = None

    def seen(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden, self.text, _ = _arguments(args, kwargs)

    def __call__(self, projection: Any, args: tuple[Any, ...]) -> Any:
        if self.state.text is None:
            return None
        negative = self.state.shown_with(self.text)[0]
        return (self.layer(self.base, self.hidden, args[0], self.text, negative), *args[1:])


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return picture tokens, text and bias of a cross-attention call; IP-Adapter's pictures are left out."""
    told = (
        dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
    )
    text = told["encoder_hidden_states"]
    return told["hidden_states"], text[0] if isinstance(text, tuple) else text, told.get("attention_mask")
