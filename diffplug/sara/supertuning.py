"""The linear layers of a delta as an adapter of peft's Supertuning (arXiv 2607.09287), and back.

peft makes room for int(numel (1 - sparsity)) entries of each layer when it loads, so that only a delta with
one density in every layer fits: one trained with `per_layer=True`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.files import atomic_path, output_folder, read_json, write_json
from diffplug.sara.delta import Delta, SparseDelta, print_places
from diffplug.sara.targets import named_weights, values_at

__all__ = ["from_supertuning", "to_supertuning"]

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<layer>.+)\.supertuning_(?P<part>values|indices)(?:\.[^.]+)?$"
)


def to_supertuning(
    delta: SparseDelta, module: nn.Module, folder: str | os.PathLike[str], component: str | None = None
) -> list[str]:
    """Write `adapter_config.json` and `adapter_model.safetensors`; return the tensors that were left out.

    module: the model it is for, which tells the linear layers from the others. component: of the delta, None
    for its only one. Raises ValueError where no linear layer is changed, and where their densities differ.
    """
    from safetensors.torch import save_file

    entries = delta.components[component or _only(delta)]
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    taken = {name: one for name, one in entries.items() if name in linear}
    if not taken:
        raise ValueError("the delta changes no linear layer, and Supertuning knows no others")
    sparsity = _sparsity(taken)
    tensors: dict[str, Tensor] = {}
    for name, one in taken.items():
        layer = name.removesuffix(".weight")
        tensors[f"base_model.model.{layer}.supertuning_values"] = one.values.float().contiguous()
        tensors[f"base_model.model.{layer}.supertuning_indices"] = one.index.int().contiguous()
    place = output_folder(folder)
    with atomic_path(place / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(place / "adapter_config.json", _config(sparsity, sorted(taken)))
    return sorted(entries.keys() - taken.keys())


def _only(delta: SparseDelta) -> str:
    if len(delta.components) != 1:
        raise ValueError(f"the delta changes {', '.join(sorted(delta.components))}: name one of them")
    return next(iter(delta.components))


def _sparsity(taken: dict[str, Delta]) -> float:
    """Return the sparsity at which peft makes room for exactly these numbers of entries."""
    numels = {name: torch.Size(one.shape).numel() for name, one in taken.items()}
    low = max(len(one) / numels[name] for name, one in taken.items())
    high = min((len(one) + 1) / numels[name] for name, one in taken.items())
    sparsity = 1 - (low + high) / 2
    odd = [n for n, one in taken.items() if int(numels[n] * (1 - sparsity)) != len(one)]
    if odd:
        raise ValueError(
            f"its layers have different densities (as {odd[0]}), which Supertuning cannot say: train with "
            "per_layer=True, or write a dense checkpoint"
        )
    return sparsity


def _config(sparsity: float, names: list[str]) -> dict[str, Any]:
    from peft import SupertuningConfig

    layers = [name.removesuffix(".weight") for name in names]
    config = SupertuningConfig(target_modules=layers, sparsity=sparsity, select_top=False).to_dict()
    return {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in config.items()}


@torch.no_grad()
def from_supertuning(
    folder: str | os.PathLike[str], module: nn.Module, component: str = "unet"
) -> SparseDelta:
    """Return a Supertuning adapter as a delta on `module`.

    Raises ValueError for a folder without one, an adapter with a low-rank part, and layers that the module
    lacks.
    """
    from safetensors.torch import load_file

    place = Path(folder)
    config = read_json(place / "adapter_config.json") if (place / "adapter_config.json").is_file() else {}
    if str(config.get("peft_type")) != "SUPERTUNING":
        raise ValueError(f"{os.fspath(folder)!r} holds no Supertuning adapter of peft")
    if config.get("r"):
        raise ValueError("the adapter has a low-rank part (r is set), which a sparse delta cannot hold")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(place / "adapter_model.safetensors").items():
        if (match := _KEY.match(key)) is not None:
            parts.setdefault(match["layer"], {})[match["part"]] = value
    weights = named_weights(module)
    deltas = {f"{layer}.weight": _delta(f"{layer}.weight", both, weights) for layer, both in parts.items()}
    return SparseDelta({component: deltas}, {component: type(module).__name__}, {"from": "supertuning"})


def _delta(name: str, parts: dict[str, Tensor], weights: dict[str, nn.Parameter]) -> Delta:
    from diffplug.registry import unknown

    if name not in weights:
        raise unknown("layer", name, sorted(weights))
    if "indices" not in parts:
        raise ValueError("the adapter was saved without its positions: save it with save_precomputed_indices")
    index, order = parts["indices"].long().sort()
    before = values_at(weights[name], index).float().cpu()
    shape = tuple(weights[name].shape)
    return Delta(shape, index.int(), parts["values"].float()[order], before[print_places(len(index))])
