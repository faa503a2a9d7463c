"""Low-rank adapters on every linear and convolution layer (LoRA, arXiv 2106.09685), by peft.

The file is what Diffusers' `load_lora_weights` reads, with rank and alpha in its metadata, so that it is
loaded at the scale that it was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoraTuner", "adapters_off", "component_of", "lora_targets"]

ADAPTER = "student"


class LoraTuner:
    """An adapter of rank `rank` on the layers whose names end in one of `targets`, without these on all.

    alpha: the update is scaled by alpha / rank; None takes the rank. save_dtype: of the file.
    """

    def __init__(
        self,
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] = (),
        save_dtype: str = "float16",
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {rank}")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.targets, self.save_dtype = tuple(targets), save_dtype
        self.denoiser: Any = None

    def attach(self, denoiser: nn.Module) -> None:
        """Put the adapter in, in float32; the update is zero at first."""
        from peft import LoraConfig

        if not hasattr(denoiser, "add_adapter"):
            raise ValueError(
                f"{type(denoiser).__name__} takes no adapters: train all weights (tuner.kind=full)"
            )
        denoiser.requires_grad_(False).eval()
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=lora_targets(denoiser, self.targets),
            init_lora_weights="gaussian",
        )
        self.denoiser = denoiser
        self.denoiser.add_adapter(config, adapter_name=ADAPTER)
        for value in self.parameters.values():
            value.data = value.data.float()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The two factors of every layer."""
        return {
            name: value
            for name, value in self.denoiser.named_parameters()
            if f".{ADAPTER}." in name and "lora_" in name
        }

    def placed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors themselves."""
        return weights

    def original(self) -> AbstractContextManager[None]:
        """The denoiser with the adapter off."""
        return adapters_off(self.denoiser)

    def updated(self, update: int) -> None:
        """Nothing to do."""

    def load(self, path: Path) -> None:
        """Take the weights of a file that `write_lora` wrote, of the same targets and no larger rank."""
        from safetensors.torch import load_file

        if path.suffix != ".safetensors":
            raise ValueError(f"{str(path)!r} is no safetensors file: only those are read")
        prefix, state = re.compile(r"^(unet|transformer)\."), load_file(path)
        found = {prefix.sub("", name): value for name, value in state.items()}
        own = {name.replace(f".{ADAPTER}.", "."): value for name, value in self.parameters.items()}
        odd = sorted(found.keys() ^ own.keys()) or [n for n in own if not _fits(found[n], own[n])]
        if odd:
            raise ValueError(
                f"{str(path)!r} does not fit this adapter of rank {self.rank} ({odd[0]} and {len(odd) - 1} "
                "more differ): take the same tuner.targets, and a tuner.rank as large"
            )
        scales, scale = lora_scales(path), self.alpha / self.rank
        with torch.no_grad():
            for name, value in own.items():
                layer, _, part = name.rpartition(".lora_")
                factor = scales[layer] / scale if part.startswith("B") else 1.0
                if part.startswith("B"):
                    value.zero_()
                value[tuple(slice(n) for n in found[name].shape)] = factor * found[name].to(value)

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `adapter.safetensors`."""
        config = {"r": self.rank, "lora_alpha": self.alpha}
        named = {name.replace(f".{ADAPTER}.", "."): value for name, value in weights.items()}
        return write_lora(pipe, named, config, folder, getattr(torch, self.save_dtype))


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """A block in which every adapter of peft in the denoiser is off; without gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in denoiser.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def write_lora(
    pipe: Any, weights: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Write factors "module.lora_A.weight" as `adapter.safetensors` with peft's settings in the metadata."""
    import json

    from safetensors.torch import save_file

    from diffplug.files import atomic_path

    component, file = component_of(pipe), "adapter.safetensors"
    modules = sorted({name.rpartition(".lora_")[0] for name in weights})
    told = {
        f"{component}.{key}": value
        for key, value in {**config, "target_modules": modules, "bias": "none"}.items()
    }
    # one key only: the order of several is not the same in every file
    metadata = {"lora_adapter_metadata": json.dumps(told, indent=2, sort_keys=True)}
    tensors = {f"{component}.{name}": v.detach().to("cpu", dtype).contiguous() for name, v in weights.items()}
    with atomic_path(folder / file) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return {"kind": "lora", "file": file}


def _fits(found: Tensor, own: Tensor) -> bool:
    """Whether factors of a rank as large or smaller lie within one's own."""
    return found.ndim == own.ndim and all(a <= b for a, b in zip(found.shape, own.shape, strict=True))


def lora_scales(path: Path) -> dict[str, float]:
    """Return alpha / rank of every layer in a file that `write_lora` wrote."""
    import json

    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        told = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not told:
            raise ValueError(f"{str(path)!r} has no adapter metadata: only students of this package are read")
        config = {key.partition(".")[2]: value for key, value in told.items()}
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        return {
            name: alphas.get(name, config["lora_alpha"]) / ranks.get(name, config["r"])
            for name in config["target_modules"]
        }


def component_of(pipe: Any) -> str:
    """Return the name that the denoiser has in its pipeline."""
    from diffplug.training.conditions import one_denoiser

    denoiser = one_denoiser(pipe)
    return next(name for name, part in pipe.components.items() if part is denoiser)


def lora_targets(denoiser: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Return the names of all linear and convolution layers, or of those that end in one of `targets`."""
    layers = [name for name, part in denoiser.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    found = [name for name in layers if not targets or any(f".{name}".endswith(f".{t}") for t in targets)]
    if not found:
        raise ValueError(
            f"no layer of {type(denoiser).__name__} ends in {' or '.join(map(repr, targets))}: give names "
            f"such as 'to_q' in tuner.targets, or none for all layers"
        )
    return found
