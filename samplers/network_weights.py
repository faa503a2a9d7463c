"""The weights of a network under the names that they have without wrappers: the same however it is run.

Compilers, sharding, adapters, fused projections, offloading and quantisation rename, add, move or pack weights;
none of them makes another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["NetworkWeights"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = ("DataParallel", "DistributedDataParallel")
_FUSED = {"to_qkv": "to_k", "to_kv": "to_k", "to_added_qkv": "add_k_proj"}  # made from the ones beside them
_IMAGE_PROMPTS = "MultiIPAdapterImageProjection"


@dataclass
class NetworkWeights:
    """Weights of a network by name.

    base: those of the model itself, without wrappers in their names. adapters: those of active adapters (LoRA
    and relatives, IP-Adapter), which act on top. shapes: of the base weights, as they are when not quantised.
    """

    base: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, network: torch.nn.Module) -> NetworkWeights:
        """The weights of a network; costs no copy of them."""
        while type(network).__name__ in _PARALLEL:
            network = network.module  # type: ignore[assignment]
        modules = {_plain(name): module for name, module in network.named_modules()}
        found = cls()
        for name, value in network.state_dict().items():
            found._sort(_plain(name), value, modules)
        found.shapes = {name: tuple(value.shape) for name, value in found.base.items() if _is_plain(value)}
        for name, module in modules.items():
            found._unpack_shape(name, module)
        return found

    def _sort(self, name: str, value: Any, modules: dict[str, torch.nn.Module]) -> None:
        """Put a weight where it belongs: base, adapters, or nowhere where it is made from others."""
        parts, kept = name.split("."), []
        for i, part in enumerate(parts):
            owner = modules.get(".".join(parts[:i]))
            if _is_fused(owner, part):
                return
            kind = _role(owner, part, parts[i + 1 :])
            if kind == "adapter":
                self.adapters[name] = _here(value, owner, ".".join(parts[i:]))
            if kind in ("adapter", "idle"):
                return
            kept += [part] if kind == "base" else []
        owner = modules.get(".".join(parts[:-1]))
        self.base[".".join(kept)] = _here(value, owner, parts[-1])

    def _unpack_shape(self, name: str, module: torch.nn.Module) -> None:
        """Give a quantised linear layer the shapes of a plain one."""
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return
        prefix = "".join(f"{part}." for part in name.split(".") if part and part != "base_layer")
        shape = (module.out_features, module.in_features)
        weight = self.base.get(f"{prefix}weight")
        if isinstance(weight, torch.Tensor) and tuple(weight.shape) == shape:
            self.shapes[f"{prefix}weight"] = shape  # type: ignore[assignment]
            return
        packed = [each for each in self.base if each.startswith(prefix)]
        if not packed:
            return
        for each in packed:
            self.shapes.pop(each, None)
        bias = module.bias() if callable(module.bias) else module.bias
        self.shapes[f"{prefix}weight"] = shape  # type: ignore[assignment]
        if bias is not None:
            self.shapes[f"{prefix}bias"] = (module.out_features,)  # type: ignore[assignment]


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


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_fused(owner: Any, part: str) -> bool:
    """Whether a layer of an attention was put together from those that it stands beside."""
    return part in _FUSED and getattr(owner, _FUSED[part], None) is not None


def _role(owner: Any, part: str, rest: list[str]) -> str:
    """What a part of a name tells: base, a wrapper's "through", an active "adapter", or an "idle" one."""
    if owner is None:
        return "base"
    if hasattr(owner, "adapter_layer_names") and hasattr(owner, "base_layer"):
        if part == "base_layer":
            return "through"
        return "adapter" if _is_active(owner, rest) else "idle"
    if hasattr(owner, "modules_to_save") and hasattr(owner, "original_module"):
        if part == "original_module":
            return "through"
        return "adapter" if _is_active(owner, rest) else "idle"
    images = part == "encoder_hid_proj" and type(owner.encoder_hid_proj).__name__ == _IMAGE_PROMPTS
    return "adapter" if part == "processor" or images else "base"


def _is_active(layer: Any, rest: list[str]) -> bool:
    """Whether an adapter's weight acts: not where it is off, or part of the base already."""
    if getattr(layer, "disable_adapters", False):
        return False
    acting = set(getattr(layer, "active_adapters", ())) - set(getattr(layer, "merged_adapters", ()))
    return bool(acting & set(rest))


def _here(value: Any, owner: Any, name: str) -> Any:
    """The weight itself, where offloading keeps it elsewhere and leaves an empty one behind."""
    if not (isinstance(value, torch.Tensor) and value.device.type == "meta"):
        return value
    hook = getattr(owner, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if kept is not None:
            with suppress(KeyError):
                return kept[name]
    return value
