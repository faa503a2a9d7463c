"""A LoRA as a runtime adapter beside those that are there already, and taken off without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffplug.intercept import Undo
from diffplug.samplers.few_step.families import unwrapped
from diffplug.samplers.few_step.lora_file import LoRA

NAME = "few-step"


@dataclass(frozen=True, eq=False)
class _Before:
    """The adapters of one wrapped layer before ours came: which act, how strongly."""

    layer: Any
    scaling: dict[str, float]
    active: list[str]
    enabled: bool


def adapters_of(module: nn.Module) -> list[str]:
    """Return the names of the adapters on a denoiser."""
    return sorted(getattr(module, "peft_config", None) or {})


def attach_adapter(pipe: Any, component: str, lora: LoRA, strength: float) -> Undo:
    """Load a LoRA as the adapter "few-step" of a component, strength `strength`; return the undo.

    Adapters that were there keep acting as before. The pipeline's own loader does the work where it has one
    (it widens factors for control models, and minds offloading); trained scales lie in the factors already,
    so `pipe.set_adapters(["few-step", ...], [1.0, ...])` means what it says."""
    module = unwrapped(getattr(pipe, component))
    before = [_before(layer) for layer in _tuner_layers(module)]

    def undo() -> None:
        _take_off(module, before)

    try:
        with quiet_libraries():
            _load(pipe, component, module, lora)
        _let_act(module, before)
        set_strength(module, strength)
    except BaseException:
        if NAME in adapters_of(module):
            undo()
        raise
    return undo


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Diffusers' notices are off inside the block: what they would tell was checked before."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)


def set_strength(module: nn.Module, strength: float) -> None:
    """Set how strongly the adapter acts, 1 as trained, 0 not at all; costs no synchronisation."""
    for layer in _tuner_layers(module):
        if NAME in layer.scaling:
            layer.set_scale(NAME, strength)


def _load(pipe: Any, component: str, module: Any, lora: LoRA) -> None:
    if any(hasattr(pipe, name) for name in _WIDENS):  # FLUX for control models, Wan for image-to-video
        second = {"load_into_transformer_2": True} if component == "transformer_2" else {}
        pipe.load_lora_weights(lora.state("transformer"), adapter_name=NAME, **second)
    elif hasattr(module, "load_lora_adapter"):
        state = lora.state(component)
        module.load_lora_adapter(state, prefix=component, adapter_name=NAME, _pipeline=pipe)
    else:
        _inject(module, lora)
    if NAME not in adapters_of(module):
        raise ValueError(f"the {component} of {type(pipe).__name__} took no adapter: use merge='fuse'")


def _inject(module: nn.Module, lora: LoRA) -> None:
    """Wrap the layers with PEFT alone, for networks that Diffusers gave no loader (PixArt)."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = {key.removeprefix("x."): value for key, value in lora.state("x").items()}
    ranks = {name: layer.rank for name, layer in lora.layers.items() if layer.rank}
    rank = next(iter(ranks.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        lora_bias=any(key.endswith("lora_B.bias") for key in state),
    )
    inject_adapter_in_model(config, module, adapter_name=NAME)
    set_peft_model_state_dict(module, state, adapter_name=NAME)


_WIDENS = ("_maybe_expand_lora_state_dict", "_maybe_expand_t2v_lora_for_i2v")


def _tuner_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def _before(layer: Any) -> _Before:
    return _Before(layer, dict(layer.scaling), list(layer.active_adapters), not layer.disable_adapters)


def _let_act(module: nn.Module, before: list[_Before]) -> None:
    """Make ours act beside what acted before, in every layer that has it, and let nothing of it learn."""
    known = {id(each.layer): each for each in before}
    for layer in _tuner_layers(module):
        each = known.get(id(layer))
        others = each.active if each is not None and each.enabled else []
        _activate(layer, [*others, *([NAME] if NAME in layer.scaling else [])])
        if each is not None:
            layer.scaling.update(each.scaling)
    for name, weight in module.named_parameters():
        if f".{NAME}." in name:
            weight.requires_grad_(False)


def _activate(layer: Any, names: list[str], enabled: bool = True) -> None:
    """Make exactly these adapters act, without touching who learns."""
    learning = {name: weight.requires_grad for name, weight in layer.named_parameters()}
    layer.enable_adapters(True)
    layer.set_adapter(names)
    if not enabled:
        layer.enable_adapters(False)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(learning[name])


def _take_off(module: Any, before: list[_Before]) -> None:
    """Remove our adapter, the wrappers that came with it, and put the adapters before it back as they acted.

    Adapters that a person loaded meanwhile stay.
    """
    names = adapters_of(module)
    if NAME not in names:  # a person unloaded it meanwhile
        return
    if names == [NAME]:
        _unload(module)
        return
    for layer in _tuner_layers(module):
        if NAME in layer.scaling:
            layer.delete_adapter(NAME)
    del module.peft_config[NAME]
    known = {id(each.layer) for each in before}
    unwrap(module, lambda layer: id(layer) not in known and not layer.scaling)
    for each in before:
        kept = [name for name in _acting(each.layer) if name not in each.scaling]
        _activate(each.layer, [*each.active, *kept], each.enabled)
        each.layer.scaling.update(each.scaling)


def _acting(layer: Any) -> list[str]:
    """Return the adapters that act in a layer."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


def _unload(module: Any) -> None:
    if hasattr(module, "unload_lora"):
        module.unload_lora()
        return
    unwrap(module, lambda layer: True)
    del module.peft_config


def unwrap(module: nn.Module, which: Callable[[Any], bool]) -> None:
    """Put the plain layers back where PEFT wrapped them, for wrappers that are not needed any more."""
    for name, part in list(module.named_modules()):
        if getattr(part, "base_layer", None) is not None and which(part):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], part.get_base_layer())
