"""LoRA files told by their structure: which modules they change, by how much, whether an alpha is stored.

Whatever the format (kohya, PEFT, Diffusers, lightx2v), a file becomes a `LoRA`: for each module of the
denoiser the two factors, with alpha / rank multiplied in. A file without alphas gets the trained scale of its
recipe, so that a strength of 1 always means what the authors trained; loaders alone would take alpha = rank
for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".lora_A.default.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_B.default.weight")
_BIAS = (".lora_B.bias", ".lora_B.default.bias", ".diff_b")
_DIFF, _ALPHA = (".diff",), (".alpha",)
_PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "unet.", "transformer.")
_KOHYA = ("lora_unet__", "lora_unet_", "lora_transformer_")


@dataclass
class Layer:
    """What a file does to one module: W + up @ down (alpha and rank multiplied in) + diff, and bias + bias.

    endings: how the parts' keys ended in the file, for converters that look at them.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    diff: Tensor | None = None
    endings: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank; 0 where there are no factors."""
        return 0 if self.down is None else self.down.shape[0]

    def delta(self) -> Tensor | None:
        """Return the change of the weight in float32, shaped like the weight; None where there is none."""
        if self.down is None or self.up is None:
            return None if self.diff is None else self.diff.float()
        down, up = self.down.float(), self.up.float()
        if up.ndim > 2 and up[0, 0].numel() > 1:
            raise ValueError("the second factor of a convolution is larger than 1x1: not supported")
        product = up.flatten(1) @ down.flatten(1)
        product = product.view(up.shape[0], *down.shape[1:])
        return product if self.diff is None else product + self.diff.float()


@dataclass
class LoRA:
    """A file's layers by module name of one denoiser; `with_alpha`: alphas were stored in it."""

    layers: dict[str, Layer]
    with_alpha: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values() if layer.rank}))

    def state(self, prefix: str, strength: float = 1.0) -> dict[str, Tensor]:
        """Return the layers as a PEFT state dict under `prefix` ("unet", "transformer"), without alphas."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if layer.down is not None and layer.up is not None:
                found[f"{prefix}.{name}.lora_A.weight"] = layer.down
                found[f"{prefix}.{name}.lora_B.weight"] = layer.up * strength
                if layer.bias is not None:
                    found[f"{prefix}.{name}.lora_B.bias"] = layer.bias * strength
        return found

    @property
    def beside(self) -> dict[str, Layer]:
        """The layers that change weights or biases without factors, which no adapter can hold."""
        return {
            name: Layer(bias=layer.bias if layer.down is None else None, diff=layer.diff)
            for name, layer in self.layers.items()
            if layer.diff is not None or (layer.down is None and layer.bias is not None)
        }


def is_lora(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is low-rank: whether it has factors, or differences."""
    return any(key.endswith((*_DOWN, *_UP, *_DIFF, ".diff_b")) for key in state)


def read_lora(
    state: Mapping[str, Tensor],
    module: nn.Module,
    *,
    pipeline: Any = None,
    trained_scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
    what: str = "this file",
) -> LoRA:
    """Return the LoRA that a state dict holds for `module`, every key accounted for.

    pipeline: the class whose converter names modules of foreign formats. trained_scale: alpha / rank where
    the file has none. Raises ValueError with the first key that belongs to no module, has no partner or
    another shape, and for DoRA, LoKr and LoHa files."""
    _refuse_kinds(state, what)
    modules = plain_modules(module)
    pairs, alphas, strange = _grouped(state)
    if strange:
        raise ValueError(f"{what} is no LoRA this package reads: key {strange!r} is none of its parts")
    alphas = alphas or _config_alphas(pairs, metadata)
    layers = _converted(_scaled(pairs, alphas, trained_scale, what), modules, pipeline, what)
    for name, layer in layers.items():
        _check_shapes(name, layer, modules[name], what)
    return LoRA(layers, with_alpha=bool(alphas))


def plain_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name as they were before PEFT wrapped any: `to_q.base_layer` is called `to_q`."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if ".lora_" in f".{name}" or getattr(part, "base_layer", None) is not None:
            continue
        found[name.removesuffix(".base_layer")] = part
    return found


def _refuse_kinds(state: Mapping[str, Any], what: str) -> None:
    for mark, kind in ((".dora_scale", "DoRA"), (".lokr_", "LoKr"), (".hada_", "LoHa")):
        key = next((key for key in state if mark in key), None)
        if key is not None:
            raise ValueError(f"{what} is a {kind} file (key {key!r}): few-step recipes take plain LoRA only")


_PARTS = (("down", _DOWN), ("up", _UP), ("bias", _BIAS), ("diff", _DIFF))


def _grouped(state: Mapping[str, Tensor]) -> tuple[dict[str, Layer], dict[str, float], str]:
    """Return the parts of each module, its alpha, and the first key that is no part of a LoRA."""
    layers: dict[str, Layer] = {}
    alphas: dict[str, float] = {}
    for key, value in state.items():
        part, stem = _split(key)
        if part == "alpha":
            alphas[stem] = float(value)
        elif part:
            layer = layers.setdefault(stem, Layer())
            setattr(layer, part, value)
            layer.endings[part] = key.removeprefix(stem)
        else:
            return layers, alphas, key
    return layers, alphas, ""


def _split(key: str) -> tuple[str, str]:
    for part, endings in (*_PARTS, ("alpha", _ALPHA)):
        for ending in endings:
            if key.endswith(ending):
                return part, key.removesuffix(ending)
    return "", key


def _config_alphas(pairs: Mapping[str, Layer], metadata: Mapping[str, str] | None) -> dict[str, float]:
    """Return the alphas that the header of a Diffusers file tells, by stem; empty when it tells none."""
    text = (metadata or {}).get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    plain = {key.split(".", 1)[-1]: value for key, value in config.items()}
    if plain.get("lora_alpha") is None:
        return {}
    patterns = plain.get("alpha_pattern") or {}
    return {stem: float(_pattern(patterns, stem, plain["lora_alpha"])) for stem in pairs}


def _pattern(patterns: Mapping[str, Any], stem: str, default: Any) -> Any:
    """Return PEFT's entry for a module: patterns match a name's end, at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            return value
    return default


def _scaled(
    pairs: Mapping[str, Layer], alphas: Mapping[str, float], trained: float, what: str
) -> dict[str, Layer]:
    """Return the layers with their scale multiplied into the second factor, in float32 where it is not 1."""
    for stem in alphas:
        if stem not in pairs:
            raise ValueError(f"{what} has an alpha without factors: key {stem + '.alpha'!r}")
    for stem, layer in pairs.items():
        if (layer.down is None) != (layer.up is None):
            ending = "second" if layer.up is None else "first"
            raise ValueError(f"{what} is incomplete: {stem!r} has no {ending} factor; download it again")
        if layer.up is None or layer.down is None:
            continue
        if layer.up.ndim < 2 or layer.down.ndim < 2 or layer.up.shape[1] != layer.down.shape[0]:
            raise ValueError(
                f"{what}: the factors of {stem!r} do not fit together: "
                f"{tuple(layer.down.shape)} and {tuple(layer.up.shape)}"
            )
        scale = alphas[stem] / layer.rank if stem in alphas else 1.0 if alphas else trained
        if scale != 1.0:
            layer.up = layer.up.float() * scale
    return dict(pairs)


def _converted(
    layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], pipeline: Any, what: str
) -> dict[str, Layer]:
    """Return the layers by module name; formats that need it go through Diffusers' converter."""
    flat = {name.replace(".", "_"): name for name in modules}
    named = {stem: _module_of(stem, modules, flat) for stem in layers}
    if all(named.values()):
        return {str(name): layers[stem] for stem, name in named.items()}
    foreign = next(stem for stem, name in named.items() if not name)
    if pipeline is None or not hasattr(pipeline, "lora_state_dict"):
        raise _unknown_module(foreign, what)
    return _by_diffusers(layers, modules, flat, pipeline, foreign, what)


def _module_of(stem: str, modules: Mapping[str, nn.Module], flat: Mapping[str, str]) -> str:
    """Return the module that a key's stem means; empty when none does."""
    for prefix in _KOHYA:
        if stem.startswith(prefix) and stem.removeprefix(prefix) in flat:
            return flat[stem.removeprefix(prefix)]
    name, before = stem, ""
    while name != before:
        if name in modules and name:
            return name
        before = name
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return ""


def _by_diffusers(
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
    flat: Mapping[str, str],
    pipeline: Any,
    foreign: str,
    what: str,
) -> dict[str, Layer]:
    """Return the layers under the names that the pipeline class's own LoRA converter gives them."""
    state: dict[str, Tensor] = {}
    for stem, layer in layers.items():
        for part, ending in layer.endings.items():
            state[stem + ending] = getattr(layer, part).clone()
    try:
        found = pipeline.lora_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{what} is for another model: {foreign!r} is no module of it, and {pipeline.__name__} cannot "
            f"convert the file ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    converted = found[0] if isinstance(found, tuple) else found
    pairs, _, strange = _grouped(converted)
    if strange:
        raise _unknown_module(strange, what)
    named = {stem: _module_of(stem, modules, flat) for stem in pairs}
    unknown = next((stem for stem, name in named.items() if not name), None)
    if unknown is not None:
        raise _unknown_module(unknown, what)
    return {name: pairs[stem] for stem, name in named.items()}


def _unknown_module(stem: str, what: str) -> ValueError:
    return ValueError(f"{what} is for another model: {stem!r} is no module of this denoiser")


def _check_shapes(name: str, layer: Layer, module: nn.Module, what: str) -> None:
    """Raise ValueError unless the factors fit the module's weight; narrower inputs are allowed for Linear."""
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(f"{what} changes {name!r}, which has no weight ({type(module).__name__})")
    out, into = _sizes(module)
    if layer.down is not None and layer.up is not None:
        narrower = isinstance(module, nn.Linear) and layer.down.shape[1] <= into
        if layer.up.shape[0] != out or not (layer.down.shape[1] == into or narrower):
            raise ValueError(
                f"{what} is for another model: {name!r} goes from {into} to {out} channels here, from "
                f"{layer.down.shape[1]} to {layer.up.shape[0]} in the file"
            )
    if layer.diff is not None and layer.diff.shape != weight.shape:
        raise ValueError(f"{what}: the difference for {name!r} has shape {tuple(layer.diff.shape)}")
    if layer.bias is not None and layer.bias.shape[0] != out:
        raise ValueError(f"{what}: the bias for {name!r} has {layer.bias.shape[0]} values, not {out}")


def _sizes(module: Any) -> tuple[int, int]:
    """Return how many channels a module gives and takes, also where its weights are packed."""
    out = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    into = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
    if out is not None and into is not None:
        return int(out), int(into)
    shape = module.weight.shape
    return int(shape[0]), int(shape[1] if len(shape) > 1 else shape[0])
