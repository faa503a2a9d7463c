"""The weights of a network under the names that they have without wrappers: the same however it is run.

Compilers, sharding, adapters, fused projections, offloading and quantisation rename, add, move or pack
weights; none of them makes another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["NetworkWeights"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = ("DataParallel", "DistributedDataParallel")
_FUSED = {"to_qkv": "to_k", "to_kv": "to_k", "to_added_qkv": "add_k_proj"}  # made from the ones beside them
_IMAGE_PROMPTS = "MultiIPAdapterImageProjection"
_SPECIAL = frozenset({"base_layer", "original_module", "processor", "encoder_hid_proj", *_FUSED})


@dataclass
class NetworkWeights:
    """Weights of a network by name.

    base: those of the model itself, without wrappers in their names. adapters: those of active adapters (LoRA
    and relatives, IP-Adapter), which act on top. modules: of the network, by such names.
    """

    base: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, network: torch.nn.Module) -> NetworkWeights:
        """The weights of a network; costs no copy of them."""
        while type(network).__name__ in _PARALLEL:
            network = network.module  # type: ignore[assignment]
        named, weights = dict(network.named_modules()), network.state_dict()
        if any(not _WRAPPERS.isdisjoint(name.split(".")) for name in named):
            named = {_plain(name): module for name, module in named.items()}
            weights = {_plain(name): value for name, value in weights.items()}
        special = {name: module for name, module in named.items() if not _SPECIAL.isdisjoint(module._modules)}
        found = cls(modules=named)
        for name, value in weights.items():
            if special:
                found._sort(name, value, special)
            else:
                found.base[name] = value
        for kept in (found.base, found.adapters):
            moved = [name for name, value in kept.items() if getattr(value, "is_meta", False)]
            kept.update({name: found._moved(name, kept[name]) for name in moved})
        return found

    def _sort(self, name: str, value: Any, special: Mapping[str, torch.nn.Module]) -> None:
        """Put a weight where it belongs: base, adapters, or nowhere where it is made from others."""
        parts = name.split(".")
        kept = []
        for i, part in enumerate(parts):
            owner = special.get(".".join(parts[:i]))
            role = "base" if owner is None else _role(owner, part, parts[i + 1 :])
            if role == "adapter":
                self.adapters[name] = value
            if role in ("adapter", "idle"):
                return
            kept += [part] if role == "base" else []
        self.base[".".join(kept)] = value

    def _moved(self, name: str, empty: torch.Tensor) -> torch.Tensor:
        """The weight that offloading keeps elsewhere, where an empty one was left behind."""
        path, _, last = name.rpartition(".")
        owner = self.modules.get(path) or self.modules.get(f"{path}.base_layer")
        hook = getattr(owner, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            kept = getattr(each, "weights_map", None)
            if kept is not None:
                with suppress(KeyError):
                    value: torch.Tensor = kept[last]
                    return value
        return empty

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the base weights; of quantised linear layers those of the plain ones."""
        found = {
            name: tuple(value.shape) for name, value in self.base.items() if isinstance(value, torch.Tensor)
        }
        for name, module in self.modules.items():
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                shape = (module.out_features, module.in_features)
                prefix = "".join(f"{part}." for part in name.split(".") if part and part != "base_layer")
                if found.get(f"{prefix}weight", shape) != shape or f"{prefix}weight" not in found:
                    _unpack(found, prefix, module)
        return found


def _unpack(shapes: dict[str, tuple[int, ...]], prefix: str, module: Any) -> None:
    """Give a quantised linear layer the shapes of a plain one, where it has weights of its own."""
    packed = [name for name in shapes if name.startswith(prefix)]
    if not packed:
        return
    for name in packed:
        del shapes[name]
    bias = module.bias() if callable(module.bias) else module.bias
    shapes[f"{prefix}weight"] = (module.out_features, module.in_features)
    if bias is not None:
        shapes[f"{prefix}bias"] = (module.out_features,)


def tensors(value: Any) -> Iterator[torch.Tensor | str]:
    """The plain tensors that a weight consists of, and what else it holds in words."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif not isinstance(value, torch.Tensor):
        yield repr(value)
    elif value.is_quantized:
        yield from (value.int_repr(), value.dequantize())
    elif type(value) not in (torch.Tensor, torch.nn.Parameter) and hasattr(value, "__tensor_flatten__"):
        names, told = value.__tensor_flatten__()
        yield repr(told)
        for name in names:
            yield from tensors(getattr(value, name))
    else:
        yield value


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _role(owner: Any, part: str, rest: list[str]) -> str:
    """What a part of a name tells: base, a wrapper's "through", an active "adapter", or an "idle" one."""
    if hasattr(owner, "adapter_layer_names") and hasattr(owner, "base_layer"):
        if part == "base_layer":
            return "through"
        return "adapter" if _is_active(owner, rest) else "idle"
    if hasattr(owner, "modules_to_save") and hasattr(owner, "original_module"):
        if part == "original_module":
            return "through"
        return "adapter" if _is_active(owner, rest) else "idle"
    if part in _FUSED and getattr(owner, _FUSED[part], None) is not None:
        return "idle"
    images = part == "encoder_hid_proj" and type(owner.encoder_hid_proj).__name__ == _IMAGE_PROMPTS
    return "adapter" if part == "processor" or images else "base"


def _is_active(layer: Any, rest: list[str]) -> bool:
    """Whether an adapter's weight acts: not where it is off, or part of the base already."""
    if getattr(layer, "disable_adapters", False):
        return False
    acting = set(getattr(layer, "active_adapters", ())) - set(getattr(layer, "merged_adapters", ()))
    return bool(acting & set(rest))
