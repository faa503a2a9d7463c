"""Sparse deltas on a model: W = W0 + sum of scale * delta, taken off to the bit.

Each module keeps the deltas that are on it and its own values wherever one of them acts (in host memory).
Every change computes these entries anew from the originals, so the order of loading does not matter, and
taking the last delta off gives back the bits that were there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.network.shared_weights import own_weights
from diffplug.registry import unknown
from diffplug.sara.delta import Delta, SparseDelta, print_places
from diffplug.sara.file import ENDING, load_delta
from diffplug.sara.targets import (
    LOADED,
    components_of,
    named_weights,
    refuse_fused,
    refuse_trained,
    refuse_unusable,
    values_at,
    write_at,
)

__all__ = ["load_sara", "loaded_sara", "set_sara_scale", "unload_sara"]

_TOLERANCE = 0.01  # relative, of a base's values in another precision
_SMALLEST = 1e-7  # what float16 keeps of very small values


@dataclass(frozen=True)
class _On:
    """A delta on one module: by parameter name, and its scale."""

    deltas: Mapping[str, Delta]
    scale: float


@dataclass
class _Record:
    """What a module remembers: the deltas by name, and the originals (index, values) by parameter name.

    share_again: makes it share its weights with the networks of sibling pipelines again, if it did before.
    """

    share_again: Callable[[], None] = lambda: None
    on: dict[str, _On] = field(default_factory=dict)
    originals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Record:
        """Return the record of a sibling's network; what it shares has deltas on, so there is no way back."""
        return _Record(on=dict(self.on), originals=dict(self.originals))

    def entries(self, parameter: str) -> tuple[Tensor, Tensor]:
        """Return where a parameter differs from its base, int64, and the values it should have there."""
        index, before = self.originals[parameter]
        wide = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for name in sorted(self.on):
            one = self.on[name]
            if (delta := one.deltas.get(parameter)) is not None:
                wide.index_add_(
                    0, torch.searchsorted(index, delta.index.long()), delta.values.to(wide), alpha=one.scale
                )
        return index, wide.to(before.dtype)


def load_sara(
    target: Any,
    source: str | os.PathLike[str] | SparseDelta,
    scale: float = 1.0,
    name: str | None = None,
    *,
    any_base: bool = False,
) -> str:
    """Put a delta on a pipeline or a module, and return the name that it goes by.

    source: a `*.sara.safetensors` file, or a `SparseDelta`. scale: of the differences. name: to change its
    scale and take it off; None for the file's name. any_base: warn, instead of refusing, where the model is
    not the one that the delta was trained on. Raises ValueError, with nothing changed, for a damaged file,
    tensors that the model lacks, another base, quantised or meta weights, a name that is taken, weights that
    a SaRA trains, and weights that something else has changed since (a fused LoRA).
    """
    delta = source if isinstance(source, SparseDelta) else load_delta(source)
    check_scale(scale)
    told = name or ("delta" if isinstance(source, SparseDelta) else _stem(source))
    modules = _matched(target, delta)
    for component, module in modules.items():
        _check(component, module, delta.components[component], told, any_base)
    for component, module in modules.items():
        _add(module, told, _On(delta.components[component], float(scale)))
    return told


def set_sara_scale(target: Any, scales: Mapping[str, float] | float) -> None:
    """Change the scales of deltas, by name or all alike; 0 gives back the base to the bit.

    Raises ValueError, with nothing changed, for a name that is not loaded, or where none is.
    """
    records = _records(target)
    names = sorted({name for _, record in records for name in record.on})
    if not names and not isinstance(scales, Mapping):
        raise ValueError("no SaRA delta is loaded: load one first by load_sara")
    wanted = dict(scales) if isinstance(scales, Mapping) else dict.fromkeys(names, scales)
    for name, scale in wanted.items():
        if name not in names:
            raise unknown("SaRA delta", name, names, "Load it first by load_sara.")
        check_scale(scale)
    for module, record in records:
        _check_untouched(module, record)
    for module, record in records:
        for name in wanted.keys() & record.on.keys():
            record.on[name] = _On(record.on[name].deltas, float(wanted[name]))
        _write(module, record)


def unload_sara(target: Any, *names: str) -> None:
    """Take deltas off, all of them where none is named; the weights are what they were, to the bit.

    Raises ValueError, with nothing changed, for a name that is not loaded, and for weights that something
    else has changed since.
    """
    records = _records(target)
    known = sorted({name for _, record in records for name in record.on})
    for name in names:
        if name not in known:
            raise unknown("SaRA delta", name, known)
    for module, record in records:
        _check_untouched(module, record)
    for module, record in records:
        for name in names or list(record.on):
            record.on.pop(name, None)
        _write(module, record)
        _shrink(module, record)


def loaded_sara(target: Any) -> dict[str, float]:
    """Return the deltas that are on a pipeline or a module, with their scales."""
    return {name: one.scale for _, record in _records(target) for name, one in record.on.items()}


def _stem(path: str | os.PathLike[str]) -> str:
    return Path(path).name.removesuffix(ENDING)


def check_scale(scale: Any) -> None:
    """Raise ValueError for a scale that is no finite number."""
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) < float("inf"):
        raise ValueError(f"scale is {scale!r}: give a finite number, 1 as trained")


def _records(target: Any) -> list[tuple[nn.Module, _Record]]:
    modules = components_of(target).values()
    return [(module, vars(module)[LOADED]) for module in modules if LOADED in vars(module)]


def _matched(target: Any, delta: SparseDelta) -> dict[str, nn.Module]:
    """Return the module of each component that a delta changes."""
    modules = components_of(target)
    if isinstance(target, nn.Module) and len(delta.components) == 1:
        modules = {next(iter(delta.components)): target}
    for component in delta.components:
        if component not in modules:
            raise unknown("component", component, sorted(modules), "The file was made for it.")
    return {component: modules[component] for component in delta.components}


def _check(component: str, module: nn.Module, deltas: Mapping[str, Delta], name: str, any_base: bool) -> None:
    """Raise ValueError for whatever speaks against putting a delta on a module."""
    refuse_fused(component, module)
    weights = named_weights(module)
    refuse_trained(component, weights.values())
    for parameter, delta in deltas.items():
        if parameter not in weights:
            raise unknown(f"tensor of {type(module).__name__}", parameter, sorted(weights))
        weight = weights[parameter]
        refuse_unusable(f"{component}.{parameter}", weight)
        if tuple(weight.shape) != delta.shape:
            raise ValueError(
                f"{component}.{parameter} has the shape {tuple(weight.shape)}, the file was made for "
                f"{delta.shape}: it belongs to another model"
            )
    record = vars(module).get(LOADED)
    if record is not None:
        if name in record.on:
            raise ValueError(f"{name!r} is loaded already: unload it first, or give another name")
        _check_untouched(module, record)
    _check_base(component, weights, deltas, record, any_base)


def _check_base(
    component: str,
    weights: Mapping[str, Tensor],
    deltas: Mapping[str, Delta],
    record: _Record | None,
    any_base: bool,
) -> None:
    """Raise ValueError where the base's own values are not those that a delta was trained on."""
    odd = [name for name, delta in deltas.items() if not _same_base(name, weights[name], delta, record)]
    if not odd:
        return
    message = (
        f"this {component} is not the model that the delta was trained on ({len(odd)} of {len(deltas)} "
        f"tensors differ, as {odd[0]})"
    )
    if not any_base:
        raise ValueError(
            f"{message}: load that one (before any LoRA is fused into it, or with FewStep(merge='runtime')), "
            "or pass any_base=True to try it all the same"
        )
    warnings.warn(f"{message}: what comes out may be poor", stacklevel=5)


def _same_base(name: str, weight: Tensor, delta: Delta, record: _Record | None) -> bool:
    if delta.prints is None or not len(delta):
        return True
    places = delta.index.long()[print_places(len(delta))]
    found = values_at(weight, places).float().cpu()
    if record is not None and name in record.originals:
        index, before = record.originals[name]
        at = torch.searchsorted(index, places).clamp(max=len(index) - 1)
        found = torch.where(index[at] == places, before[at].float(), found)
    return torch.allclose(found, delta.prints.float(), rtol=_TOLERANCE, atol=_SMALLEST)


def _check_untouched(module: nn.Module, record: _Record) -> None:
    """Raise ValueError where entries are not what they were set to; unloading would undo more than itself."""
    weights = named_weights(module)
    for name in record.originals:
        index, wanted = record.entries(name)
        refuse_unusable(name, weights[name])
        found = values_at(weights[name], index).cpu()
        if not torch.equal(found, wanted.to(found.dtype)):
            raise ValueError(
                f"{name} has been changed since the SaRA delta was loaded (a LoRA was fused?): undo that "
                "first (pipe.unfuse_lora()), or load the model anew"
            )


def _add(module: nn.Module, name: str, one: _On) -> None:
    record = vars(module).get(LOADED)
    if record is None:
        record = vars(module)[LOADED] = _Record(own_weights(module))
    weights = named_weights(module)
    for parameter, delta in one.deltas.items():
        _widen(record, parameter, weights[parameter], delta.index.long())
    record.on[name] = one
    _write(module, record)


def _widen(record: _Record, parameter: str, weight: Tensor, index: Tensor) -> None:
    """Keep the originals of entries that no delta has touched so far."""
    values = values_at(weight, index).cpu()
    if parameter in record.originals:
        known, before = record.originals[parameter]
        fresh = ~torch.isin(index, known)
        index, order = torch.cat([known, index[fresh]]).sort()
        values = torch.cat([before.to(values.dtype), values[fresh]])[order]
    record.originals[parameter] = (index, values)


def _write(module: nn.Module, record: _Record) -> None:
    own_weights(module)
    weights = named_weights(module)
    for parameter in record.originals:
        write_at(weights[parameter], *record.entries(parameter))


def _shrink(module: nn.Module, record: _Record) -> None:
    """Forget originals of entries that no delta acts on any more."""
    for parameter, (index, before) in list(record.originals.items()):
        used = [one.deltas[parameter].index.long() for one in record.on.values() if parameter in one.deltas]
        if not used:
            del record.originals[parameter]
            continue
        kept = torch.isin(index, torch.cat(used))
        record.originals[parameter] = (index[kept], before[kept])
    if not record.on:
        record.share_again()
        del vars(module)[LOADED]
