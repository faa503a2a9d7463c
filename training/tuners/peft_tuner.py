"""Tuners of peft by name: DoRA, rank-stabilised LoRA, OFT, LoHa, LoKr, HRA; or any of its configs.

Diffusers' LoRA loader reads none of their files, so they are written as peft writes them, with the config in
the metadata; `FewStep(folder)` puts them on again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.files import atomic_path
from diffplug.registry import unknown
from diffplug.training.tuners.lora import ADAPTER, adapters_off, component_of, lora_targets
from diffplug.training.tuners.settings import PEFT_KINDS

__all__ = ["PeftTuner"]


class PeftTuner:
    """An adapter of peft on a denoiser.

    kind: a name of `PEFT_KINDS`, or a `PeftConfig` of one's own. rank: block size of "oft", which turns
    linear layers and convolutions of kernel 1 only. alpha, targets,
    save_dtype: as of `LoraTuner`.
    """

    def __init__(
        self,
        kind: Any,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] = (),
        save_dtype: str = "float16",
    ) -> None:
        if isinstance(kind, str) and kind not in PEFT_KINDS:
            raise unknown("tuner of peft", kind, list(PEFT_KINDS))
        self.kind, self.rank, self.alpha = kind, rank, float(rank if alpha is None else alpha)
        self.targets, self.save_dtype = tuple(targets), save_dtype
        self.denoiser: Any = None
        self.config: Any = None

    def attach(self, denoiser: nn.Module) -> None:
        """Put the adapter in, in float32; it changes nothing at first."""
        if not hasattr(denoiser, "add_adapter"):
            raise ValueError(f"{type(denoiser).__name__} takes no adapters: take tuner.kind=sara or full")
        denoiser.requires_grad_(False).eval()
        layers = lora_targets(denoiser, self.targets)
        self.config = self._config(_turned(denoiser, layers) if self.kind == "oft" else layers)
        self.denoiser = denoiser
        self.denoiser.add_adapter(self.config, adapter_name=ADAPTER)
        for value in self.parameters.values():
            value.data = value.data.float()

    def _config(self, layers: list[str]) -> Any:
        import peft

        common: dict[str, Any] = {"target_modules": layers}
        if self.kind in ("dora", "rslora"):
            flag = {"use_dora": True} if self.kind == "dora" else {"use_rslora": True}
            return peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, **flag, **common)
        if self.kind == "oft":
            return peft.OFTConfig(r=0, oft_block_size=self.rank, **common)
        if self.kind == "hra":
            return peft.HRAConfig(r=self.rank, **common)
        if self.kind in ("loha", "lokr"):
            made = peft.LoHaConfig if self.kind == "loha" else peft.LoKrConfig
            return made(r=self.rank, alpha=self.alpha, **common)
        return self.kind

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in the denoiser."""
        return {
            name: value
            for name, value in self.denoiser.named_parameters()
            if f".{ADAPTER}." in f"{name}." and value.requires_grad
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
        """Take the tensors of a file that `save` wrote, of the same kind, rank and targets."""
        from safetensors.torch import load_file

        found, own = load_file(path), {_plain(name): value for name, value in self.parameters.items()}
        if found.keys() != own.keys() or any(found[n].shape != own[n].shape for n in own):
            raise ValueError(
                f"{str(path)!r} does not fit this adapter: take the same [tuner] as it was trained with"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(found[name])

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `adapter.peft.safetensors`."""
        from safetensors.torch import save_file

        file, dtype = "adapter.peft.safetensors", getattr(torch, self.save_dtype)
        tensors = {_plain(name): v.detach().to("cpu", dtype).contiguous() for name, v in weights.items()}
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in self.config.to_dict().items()}
        metadata = {
            "peft": json.dumps({"component": component_of(pipe), **config}, sort_keys=True, default=str)
        }
        with atomic_path(folder / file) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return {"kind": "peft", "file": file}


def _turned(denoiser: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the layers that OFT leaves as they are at first: peft's form for wider kernels does not."""
    found = dict(denoiser.named_modules())
    return [name for name in layers if getattr(found[name], "kernel_size", (1, 1)) == (1, 1)]


def _plain(name: str) -> str:
    """Return a tensor's name without that of the adapter."""
    return f"{name}.".replace(f".{ADAPTER}.", ".").rstrip(".")
