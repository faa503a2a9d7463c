"""The weights of a row on a pipeline: read, told by structure, put on, and taken off exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffplug.intercept import Undo, original_class
from diffplug.samplers.few_step.adapter import NAME, adapters_of, attach_adapter
from diffplug.samplers.few_step.catalogue import Row, Weights
from diffplug.samplers.few_step.families import unwrapped
from diffplug.samplers.few_step.lora_file import LoRA, is_lora, plain_modules, read_lora
from diffplug.samplers.few_step.patch import (
    ROUNDING,
    fuse,
    lost_to_rounding,
    replace_weights,
    why_not_fused,
)
from diffplug.samplers.few_step.tuned import put_on_tuned
from diffplug.samplers.few_step.weights_file import located, read_weights

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
Strength = float | Sequence[float] | Mapping[str, float]


@dataclass(frozen=True)
class Installed:
    """What was done to a component: how ("runtime", "fuse", "sparse", "replace"), with which strength."""

    component: str
    how: str
    strength: float


def install(
    row: Row,
    pipe: Any,
    *,
    strength: Strength = 1.0,
    merge: str = "auto",
    paths: Paths = None,
    whole: bool = True,
) -> tuple[list[Installed], Undo]:
    """Put a row's weights on a pipeline; return what was done, and the function that takes it back.

    strength: 1 as trained; several numbers, or one for each component, where there are two transformers.
    merge: "runtime", "fuse", or "auto", which fuses unless the weights are quantised or offloaded, other
    adapters are there, only a part of the run is meant (`whole` False), or rounding the fused weights would
    lose more than 5 % of the change (small changes in bfloat16). paths: files to take instead of the row's.
    Raises ValueError for files that do not fit, and for a fused or few-step LoRA that is there already.
    """
    undos: list[Undo] = []

    def undo() -> None:
        while undos:
            undos.pop()()

    done = []
    try:
        for weights, path in zip(row.weights, _paths(row, paths), strict=True):
            if row.kind == "pipeline":
                continue
            module = _component(row, pipe, weights)
            amount = _strength(strength, row, weights)
            how, back = _put_on(row, pipe, weights, module, amount, merge, path, whole)
            undos.append(back)
            done.append(Installed(weights.component, how, amount))
    except BaseException:
        undo()
        raise
    return done, undo


def _paths(row: Row, paths: Paths) -> list[Any]:
    if paths is None:
        return [None] * len(row.weights)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if row.kind == "pipeline":
        raise ValueError(
            f"{row.name} is a whole pipeline: load it with from_pretrained, it takes no weights="
        )
    if len(given) == 1 and len(row.weights) > 1 and os.path.isdir(given[0]):
        given = given * len(row.weights)
    if len(given) != len(row.weights):
        raise ValueError(
            f"{row.name} has {len(row.weights)} weight files, weights= has {len(given)}: give each one"
        )
    return given


def _component(row: Row, pipe: Any, weights: Weights) -> Any:
    module = unwrapped(getattr(pipe, weights.component, None))
    if module is None:
        raise ValueError(f"{row.name} is for a {weights.component}, which this {type(pipe).__name__} has not")
    if NAME in adapters_of(module):
        raise ValueError(
            f"the {weights.component} carries a few-step LoRA already: undo it first, two would add up"
        )
    if any(getattr(part, "merged", False) for part in module.modules()):
        raise ValueError(
            f"a LoRA is fused into the {weights.component} already, which would hide this one: call "
            "pipe.unfuse_lora() first, or keep it as an adapter with set_adapters"
        )
    return module


def _strength(strength: Strength, row: Row, weights: Weights) -> float:
    """Return the strength for one file."""
    if isinstance(strength, Mapping):
        return float(strength.get(weights.component, 1.0))
    if isinstance(strength, Sequence):
        if len(strength) != len(row.weights):
            raise ValueError(
                f"{row.name} has {len(row.weights)} weight files, strength has {len(strength)} numbers"
            )
        return float(strength[row.weights.index(weights)])
    return float(strength)


def _put_on(
    row: Row, pipe: Any, weights: Weights, module: Any, strength: float, merge: str, path: Any, whole: bool
) -> tuple[str, Undo]:
    file = located(row, weights, path)
    if row.kind in ("sara", "peft"):
        return put_on_tuned(row, weights.component, module, file, strength)
    state, metadata = read_weights(file)
    what = f"{file.name} of {row.name}"
    if not is_lora(state):
        _check_full(row, module, pipe, strength, what)
        part = "motion_modules" if row.kind == "motion" else ""
        return "replace", replace_weights(module, state, what, part)
    lora = read_lora(
        state,
        module,
        pipeline=original_class(pipe),
        trained_scale=row.lora_scale,
        metadata=metadata,
        what=what,
    )
    how = _how(row, pipe, module, lora, strength, merge, whole)
    if how == "fuse":
        return how, fuse(module, lora.layers, strength)
    return how, _runtime(pipe, weights.component, module, lora, strength)


def _check_full(row: Row, module: Any, pipe: Any, strength: float, what: str) -> None:
    if strength != 1.0:
        raise ValueError(
            f"{what} holds full weights, for which strength={strength:g} means nothing: leave it out"
        )
    if reason := why_not_fused(module, pipe):
        raise ValueError(
            f"{what} would replace the denoiser's weights, but {reason}: load {row.name} as it is"
        )


def _how(row: Row, pipe: Any, module: Any, lora: LoRA, strength: float, merge: str, whole: bool) -> str:
    """Return "fuse" or "runtime"; ValueError where fusing was asked for and cannot be."""
    asked = merge if merge != "auto" else row.merge
    if asked == "runtime":
        return "runtime"
    reason = why_not_fused(module, pipe) or ("" if whole else "it is to act in a part of the run only")
    if merge == "fuse":
        if reason:
            raise ValueError(f"{row.name} cannot be fused: {reason}; use merge='runtime'")
        return "fuse"
    if reason or adapters_of(module) or _widened(module, lora):
        return "runtime"
    return "runtime" if lost_to_rounding(module, lora, strength) > ROUNDING else "fuse"


def _widened(module: Any, lora: LoRA) -> bool:
    """Whether a layer has wider inputs than the file, as in models that take a control picture."""
    modules: dict[str, Any] = dict(plain_modules(module))
    return any(
        layer.down is not None
        and layer.down.ndim == 2
        and layer.down.shape[1] < modules[name].weight.shape[1]
        for name, layer in lora.layers.items()
    )


def _runtime(pipe: Any, component: str, module: Any, lora: LoRA, strength: float) -> Undo:
    """Attach a LoRA as an adapter; what no adapter can hold (weight differences) is added to the weights."""
    beside = lora.beside
    if beside and (reason := why_not_fused(module, pipe)):
        warnings.warn(
            f"{len(beside)} weight differences of the file are left out, since {reason}", stacklevel=6
        )
        beside = {}
    undo_beside = fuse(module, beside, strength)
    try:
        undo_adapter = attach_adapter(pipe, component, lora, strength)
    except BaseException:
        undo_beside()
        raise

    def undo() -> None:
        try:
            undo_adapter()
        finally:
            undo_beside()

    return undo
