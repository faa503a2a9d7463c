"""Weights changed in place with their originals kept, so that undoing is exact to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.intercept import Undo
from diffplug.network.shared_weights import own_weights
from diffplug.samplers.few_step.lora_file import Layer, LoRA, plain_modules

ROUNDING = 0.05  # share of a change that may be lost to the precision of the weights
_SAMPLED = 8  # layers that are looked at to measure the loss


@dataclass(frozen=True, eq=False)
class _Kept:
    """The original of one parameter or buffer, and where it belongs."""

    module: nn.Module
    attribute: str
    original: Tensor


@torch.no_grad()
def fuse(module: nn.Module, layers: Mapping[str, Layer], strength: float) -> Undo:
    """Add `strength` times each layer's change to the weights, in float32, then round; return the undo.

    The originals are kept on the CPU, so that the undo gives back the same bits. An error on the way leaves
    the weights as they were.
    """
    if not layers:
        return lambda: None
    modules, kept = plain_modules(module), list[_Kept]()
    share_again = own_weights(module)

    def undo() -> None:
        put_back(kept)
        share_again()

    try:
        for name, layer in layers.items():
            for attribute, change in _changes(modules[name], layer):
                target = getattr(modules[name], attribute)
                kept.append(_Kept(modules[name], attribute, target.detach().to("cpu", copy=True)))
                wide = target.float() + strength * change.to(target.device)
                target.copy_(wide.to(target.dtype))
    except BaseException:
        undo()
        raise
    return undo


def _changes(module: Any, layer: Layer) -> Iterable[tuple[str, Tensor]]:
    """Yield the names of the parameters of a module that a layer changes, with the changes in float32."""
    delta = layer.delta()
    if delta is not None:
        if delta.shape != module.weight.shape:
            raise ValueError(
                f"a change of shape {tuple(delta.shape)} cannot be fused into a weight of "
                f"{tuple(module.weight.shape)}: use merge='runtime'"
            )
        yield "weight", delta
    if layer.bias is not None:
        if module.bias is None:
            raise ValueError("the file changes a bias that the model does not have: use merge='runtime'")
        yield "bias", layer.bias.float()


@torch.no_grad()
def replace_weights(module: nn.Module, state: Mapping[str, Tensor], what: str, only: str = "") -> Undo:
    """Copy a full state dict into a denoiser, in its own dtype; return the undo, exact to the bit.

    only: part of the denoiser that the file holds, all that has this in its name. Raises ValueError with the
    first key that is missing, strange or of another shape, before any change, and for a denoiser without that
    part.
    """
    own = {name: place for name, place in _own_tensors(module).items() if only in name}
    if not own:
        raise ValueError(f"{what} is for a denoiser with {only}, which this {type(module).__name__} has not")
    state = _without_prefix(state, own)
    for name in state:
        if name not in own:
            raise ValueError(f"{what} is for another model: it has {name!r}, which this denoiser has not")
    for name, (part, attribute) in own.items():
        if name not in state:
            raise ValueError(f"{what} is incomplete or for another model: {name!r} is missing")
        here, there = tuple(getattr(part, attribute).shape), tuple(state[name].shape)
        if here != there:
            raise ValueError(f"{what} is for another model: {name!r} is {there} in the file, {here} here")
    kept, share_again = list[_Kept](), own_weights(module)
    for name, (part, attribute) in own.items():
        target = getattr(part, attribute)
        kept.append(_Kept(part, attribute, target.detach().to("cpu", copy=True)))
        target.copy_(state[name].to(target.dtype))

    def undo() -> None:
        put_back(kept)
        share_again()

    return undo


def _own_tensors(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where the entries of a denoiser's state dict live, as named before PEFT wrapped any layer."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name in module.state_dict():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name:
            path, _, attribute = name.rpartition(".")
            found[plain] = (module.get_submodule(path), attribute)
    return found


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    for prefix in ("", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model."):
        cut = {key.removeprefix(prefix): value for key, value in state.items()}
        if set(cut) & set(own):
            return cut
    return dict(state)


@torch.no_grad()
def put_back(kept: list[_Kept]) -> None:
    """Copy the kept originals back, the last one first, to wherever the module is by now."""
    while kept:
        last = kept.pop()
        getattr(last.module, last.attribute).copy_(last.original)


@torch.no_grad()
def lost_to_rounding(module: nn.Module, lora: LoRA, strength: float) -> float:
    """Return which share of a LoRA's change rounding to the weights' dtype would lose, over a few layers.

    About 0 in float32; with small changes 1 to 4 % in float16 and 10 to 30 % in bfloat16.
    """
    modules = plain_modules(module)
    lost = total = 0.0
    for name in list(lora.layers)[:: max(1, len(lora.layers) // _SAMPLED)][:_SAMPLED]:
        delta = lora.layers[name].delta()
        weight = modules[name].weight
        if delta is None or not isinstance(weight, Tensor) or delta.shape != weight.shape:
            continue
        wide = weight.float()
        change = strength * delta.to(weight.device)
        error = (wide + change).to(weight.dtype).float() - wide - change
        lost += float(error.square().sum())
        total += float(change.square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def why_not_fused(module: nn.Module, pipe: Any) -> str:
    """Return why the weights of a denoiser cannot be changed in place, in words; empty when they can."""
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        return "it is quantised"
    for weight in module.parameters():
        if weight.is_meta:
            return "it is offloaded, so that its weights are elsewhere between the calls"
        if not weight.is_floating_point() or weight.element_size() < 2 or type(weight) not in _PLAIN:
            return f"its weights are quantised ({type(weight).__name__}, {weight.dtype})"
    if _group_offloaded(module):
        return "it is offloaded in groups, which keep copies of the weights"
    return ""


_PLAIN = (nn.Parameter, Tensor)


def _group_offloaded(module: nn.Module) -> bool:
    """Whether Diffusers moves parts of a network between devices, by hooks that it names."""
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        if any("offload" in name for name in hooks):
            return True
    return False
