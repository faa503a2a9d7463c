"""SpeedUpNet adapters as files: ours, and the public one for Stable Diffusion 1.5.

Ours is safetensors with the layers under the denoiser's own names and `AdapterMeta` as JSON in the metadata.
The public file (Williechai/SpeedUpNet, sun_adapter_sdv15_4step_addpos.safetensors) numbers its layers by
their place among a UNet's attention processors: down, up, middle, self- and cross-attention in turn, so the
k-th cross-attention layer is number 2 k + 1. It has 128 tensors, or 64 without the branch for the prompt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import atomic_path
from diffplug.samplers.negative.cross_attention import cross_attentions, unwrapped
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter
from diffplug.samplers.negative.sun_layers import LayerShape, ReleasedLayer, TiedLayer

__all__ = ["load_adapter", "save_adapter"]

FORMAT = "diffplug.speedupnet"
_RELEASED = {  # the public file's names, and ours
    "to_k_neg.weight": "negative.to_k.weight",
    "to_v_neg.weight": "negative.to_v.weight",
    "to_k_neg_alpha": "negative.alpha",
    "to_k_neg_beta": "negative.beta",
    "to_k_extra_pos.weight": "positive.to_k.weight",
    "to_v_extra_pos.weight": "positive.to_v.weight",
    "to_k_extra_pos_alpha": "positive.alpha",
    "to_k_extra_pos_beta": "positive.beta",
}
_ORDER = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}


def save_adapter(
    adapter: SunAdapter, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write an adapter as one safetensors file, and return its path. dtype: of the weights in it."""
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{name}": value.detach().to(dtype).contiguous().cpu()
        for layer, part in adapter.named_layers().items()
        for name, value in part.state_dict().items()
    }
    metadata = {"format": FORMAT, "version": "1", "adapter": json.dumps(adapter.meta.to_json())}
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return Path(path)


def load_adapter(path: str | os.PathLike[str], denoiser: Any, *, norm: str = "sample") -> SunAdapter:
    """Return the adapter of a file, for a denoiser; float32.

    norm: of the public form, "sample" or, as published, "tensor" (see `ReleasedLayer`). Raises ValueError
    for a file that is missing or damaged, with the name of the first key that is missing, unknown or of
    another size.
    """
    if norm not in ("sample", "tensor"):
        raise ValueError(f"norm is {norm!r}, allowed are 'sample' and 'tensor'")
    tensors, metadata = _read(Path(path))
    if metadata.get("format") == FORMAT:
        return _own(tensors, metadata, denoiser, str(path))
    return _public(tensors, denoiser, norm, str(path))


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no adapter file {str(path)!r}: give a .safetensors file")
    if path.suffix in (".pt", ".pth", ".bin"):
        return _unpickled(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the adapter file {str(path)!r} is damaged: {error}") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"the adapter file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"the adapter file {str(path)!r} holds no tensors by name")
    return dict(loaded)


def _own(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], denoiser: Any, path: str) -> SunAdapter:
    """Return the layers of a file of ours, built for the denoiser's layers of the same names."""
    try:
        meta = AdapterMeta.from_json(json.loads(metadata["adapter"]))
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the adapter file {path!r} does not say what it is for ({error})") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, name = key.partition(".attn2.")
        parts.setdefault(f"{layer}.attn2", {})[name] = value.float()
    there, layers = cross_attentions(denoiser), {}
    for name, part in parts.items():
        if name not in there:
            raise ValueError(
                f"{path!r} has a layer {name!r}, which this {type(unwrapped(denoiser)).__name__} has not: "
                "the adapter "
                "is for another base"
            )
        layers[name] = _empty(LayerShape.of(there[name]), part, meta)
        _load(layers[name], part, name, path)
    return _filled(layers, meta, path)


def _empty(shape: LayerShape, part: Mapping[str, Tensor], meta: AdapterMeta) -> torch.nn.Module:
    if meta.layout == "v1":
        return ReleasedLayer(shape, positive=any(name.startswith("positive") for name in part))
    gate = len(part["gate.0.weight"]) if "gate.0.weight" in part else 64
    return TiedLayer(shape, full=meta.layout == "large", gate=gate)


def _load(layer: torch.nn.Module, part: Mapping[str, Tensor], name: str, path: str) -> None:
    there = layer.state_dict()
    for key, value in there.items():
        if key not in part:
            raise ValueError(f"the adapter file {path!r} has no {name}.{key}: it is not whole")
        if part[key].shape != value.shape:
            raise ValueError(
                f"{name}.{key} in {path!r} is {[*part[key].shape]}, expected {[*value.shape]}: it is for "
                "another base"
            )
    for key in part:
        if key not in there:
            raise ValueError(f"the adapter file {path!r} has an unknown {name}.{key}")
    layer.load_state_dict(dict(part))


def _filled(layers: Mapping[str, torch.nn.Module], meta: AdapterMeta, path: str) -> SunAdapter:
    if not layers:
        raise ValueError(f"the adapter file {path!r} has no layers in it")
    return SunAdapter(layers, meta).requires_grad_(False).eval()


def _public(tensors: Mapping[str, Tensor], denoiser: Any, norm: str, path: str) -> SunAdapter:
    """Return the public file's layers, by the names of a UNet's cross-attention layers."""
    there = cross_attentions(denoiser)
    names = sorted(
        there, key=lambda name: (_ORDER.get(name.split(".")[0], 3), *map(int, re.findall(r"\.(\d+)", name)))
    )
    numbers = {2 * k + 1: name for k, name in enumerate(names)}
    parts: dict[int, dict[str, Tensor]] = {number: {} for number in numbers}
    for key in sorted(tensors, key=_place):
        number, _, own = key.partition(".")
        if not number.isdigit() or int(number) not in parts or own not in _RELEASED:
            model = type(unwrapped(denoiser)).__name__
            raise ValueError(
                f"{key!r} in {path!r} is no tensor of a SpeedUpNet adapter for this {model}, which has "
                f"{len(names)} cross-attention layers"
            )
        parts[int(number)][_RELEASED[own]] = tensors[key].float()
    positive = any(name.startswith("positive") for part in parts.values() for name in part)
    layers: dict[str, torch.nn.Module] = {}
    for place, name in numbers.items():
        layer = ReleasedLayer(LayerShape.of(there[name]), positive=positive, norm=norm)
        _check_public(layer, parts[place], place, path)
        layer.load_state_dict(parts[place])
        layers[name] = layer
    meta = AdapterMeta(layout="v1", family="sd15", guidance=1.0, guidance_range=(1.0, 1.0), steps=(4,))
    return _filled(layers, meta, path)


def _check_public(layer: ReleasedLayer, part: Mapping[str, Tensor], number: int, path: str) -> None:
    """Raise ValueError, in the file's own names, for what is missing or of another size."""
    theirs = {own: name for name, own in _RELEASED.items()}
    for own, value in layer.state_dict().items():
        key = f"{number}.{theirs[own]}"
        if own not in part:
            raise ValueError(f"the adapter file {path!r} has no {key}: it is not whole")
        if part[own].shape != value.shape:
            raise ValueError(
                f"{key} in {path!r} is {[*part[own].shape]}, this base needs {[*value.shape]}: the "
                "adapter is for "
                "another base"
            )


def _place(key: str) -> tuple[int, str]:
    number = key.partition(".")[0]
    return (int(number) if number.isdigit() else -1, key)
