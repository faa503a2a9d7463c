"""The parameters that a delta or a tuner touches: found by plain names, refused where nothing can change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LOADED",
    "TRAINED",
    "components_of",
    "local",
    "named_weights",
    "plain_name",
    "refuse_fused",
    "refuse_loaded",
    "refuse_trained",
    "refuse_unusable",
    "values_at",
    "write_at",
]

LOADED = "_diffplug_sara"
"""Where a module keeps the deltas that are on it."""

TRAINED = "_diffplug_sara_trains"
"""What marks a parameter that a SaRA trains."""

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|module|base_layer|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def plain_name(name: str) -> str:
    """Return a parameter's name without what compiling, wrapping and unfused adapters put into it."""
    return _WRAPPERS.sub("", name)


def components_of(target: Any) -> dict[str, nn.Module]:
    """Return the modules of a pipeline, of a mapping, or a lone module under the name of its kind.

    Raises ValueError for anything else.
    """
    if isinstance(target, nn.Module):
        return {_kind(target): target}
    parts = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise ValueError(f"{type(target).__name__} holds no weights: give a pipeline, or one of its networks")
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _kind(module: nn.Module) -> str:
    """Return "unet", "transformer", "text_encoder", ... as Diffusers' pipelines call such a module."""
    name = type(getattr(module, "_orig_mod", module)).__name__
    for part, kind in (
        ("UNet", "unet"),
        ("Transformer", "transformer"),
        ("ControlNet", "controlnet"),
        ("TextModel", "text_encoder"),
        ("Encoder", "text_encoder"),
        ("Autoencoder", "vae"),
    ):
        if part in name:
            return kind
    return "model"


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters by plain names, each once, adapters' factors left out."""
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for name, value in module.named_parameters():
        if id(value) not in seen and ".lora_" not in f".{name}":
            seen.add(id(value))
            found[plain_name(name)] = value
    return found


def refuse_unusable(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight whose entries cannot be changed one by one."""
    kind = type(weight).__name__
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device (sequential offload, or not loaded yet): load the weights first, "
            "and enable offloading afterwards"
        )
    plain = (Tensor, nn.Parameter)
    wrapped = kind not in ("Parameter", "Tensor", "Buffer", "DTensor") and type(weight) not in plain
    if wrapped or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"{name} is quantised ({kind}, {str(weight.dtype).removeprefix('torch.')}): load the model in "
            "bfloat16, float16 or float32"
        )


def local(value: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (FSDP2), the tensor itself otherwise."""
    return value.to_local() if hasattr(value, "to_local") else value


def values_at(weight: Tensor, index: Tensor) -> Tensor:
    """Return a weight's values at flat positions in C order, whatever its memory layout."""
    flat = local(weight.detach())
    return flat.reshape(-1).index_select(0, index.to(flat.device))


@torch.no_grad()
def write_at(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values at flat positions in C order, rounded to its dtype, whatever the memory layout."""
    own = local(weight.data)  # autograd need not know: changes are undone, or made between steps
    places, rounded = index.to(own.device).long(), values.to(own.device, own.dtype)
    if own.is_contiguous():
        own.view(-1).index_copy_(0, places, rounded)
    else:
        own.index_put_(torch.unravel_index(places, own.shape), rounded)


def refuse_trained(name: str, weights: Iterable[Tensor]) -> None:
    """Raise ValueError where a SaRA trains a module's weights: it would write over what is put on them."""
    if any(hasattr(weight, TRAINED) for weight in weights):
        raise ValueError(
            f"a SaRA trains this {name}, and would write over the delta: call its detach() first, or load "
            "the model anew"
        )


def refuse_loaded(name: str, module: nn.Module) -> None:
    """Raise ValueError where a delta is on a module: what is trained on top would fit no other model."""
    if LOADED in vars(module):
        raise ValueError(
            f"a SaRA delta is on this {name}: call unload_sara() first, or write both as one model by "
            "sara_to_checkpoint() and train that"
        )


def refuse_fused(name: str, module: nn.Module) -> None:
    """Raise ValueError where a LoRA is fused into a module's weights: they are no base any more."""
    if any(getattr(part, "merged", False) is True for part in module.modules()):
        raise ValueError(
            f"a LoRA is fused into the {name}: call pipe.unfuse_lora() first (adapters that are not fused "
            "may stay)"
        )
