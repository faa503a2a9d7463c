"""All weights of the denoiser: the quickest on small models, and a file of their full size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.files import atomic_path
from diffplug.network.denoiser import denoisers
from diffplug.training.tuners.lora import lora_scales

__all__ = ["FullTuner"]


class FullTuner:
    """Moves every weight. The weights before are kept, for `original`: memory for one more denoiser.

    save_dtype: of the file, "float16" or "float32".
    """

    def __init__(self, *, save_dtype: str = "float16") -> None:
        self.save_dtype = save_dtype
        self.denoiser: nn.Module | None = None
        self.before: dict[str, Tensor] = {}

    def attach(self, denoiser: nn.Module) -> None:
        """Make all weights float32 and trainable."""
        self.denoiser = denoiser.float().requires_grad_(True).eval()
        self.before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Every weight."""
        assert self.denoiser is not None, "attach the tuner first"  # noqa: S101 - an order of our own calls
        return dict(self.denoiser.named_parameters())

    def placed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors themselves."""
        return weights

    @contextmanager
    def original(self) -> Iterator[None]:
        """The denoiser with the weights that it had, until the end of the block."""
        now = self.parameters
        learnt = {name: value.data for name, value in now.items()}
        for name, value in now.items():
            value.data = self.before[name].to(value.device)
        try:
            with torch.no_grad():
                yield
        finally:
            for name, value in now.items():
                value.data = learnt[name]

    def load(self, path: Path) -> None:
        """Take the weights of a file that `save` wrote; `original` stays what it was."""
        from safetensors.torch import load_file

        if path.suffix != ".safetensors":
            raise ValueError(f"{str(path)!r} is no safetensors file: only those are read")
        found = load_file(path)
        if any(".lora_A." in name for name in found):
            self._add_lora(path, found)
            return
        odd = [n for n, v in self.parameters.items() if n not in found or found[n].shape != v.shape]
        if odd:
            raise ValueError(
                f"{str(path)!r} belongs to another model: {odd[0]!r} is missing or has another shape"
            )
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(found[name])

    @torch.no_grad()
    def _add_lora(self, path: Path, found: Mapping[str, Tensor]) -> None:
        """Add a LoRA of this package to the weights, at the scale in its metadata."""
        own = self.parameters
        for name, scale in lora_scales(path).items():
            if f"{name}.weight" not in own:
                raise ValueError(f"{str(path)!r} belongs to another model: there is no layer {name!r}")
            down, up = (_of_layer(found, f"{name}.lora_{part}.weight").float() for part in "AB")
            change = scale * up.flatten(1) @ down.flatten(1)
            own[f"{name}.weight"].add_(change.view_as(own[f"{name}.weight"]))

    def updated(self, update: int) -> None:
        """Nothing to do."""

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `denoiser.safetensors`, all weights under the names of the denoiser's state."""
        from safetensors.torch import save_file

        file, dtype = "denoiser.safetensors", getattr(torch, self.save_dtype)
        state = {**denoisers(pipe)[0].state_dict(), **weights}
        with atomic_path(folder / file) as temporary:
            save_file(
                {name: v.detach().to("cpu", dtype).contiguous() for name, v in state.items()}, temporary
            )
        return {"kind": "denoiser", "file": file}


def _of_layer(found: Mapping[str, Tensor], name: str) -> Tensor:
    return next(value for key, value in found.items() if key.partition(".")[2] == name)
