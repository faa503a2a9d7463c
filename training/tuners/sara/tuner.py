"""SaRA as the tuner of every trainer (`--tuner sara`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.sara.delta import SparseDelta
from diffplug.sara.file import load_delta, save_delta
from diffplug.sara.targets import local
from diffplug.training.tuners.lora import component_of
from diffplug.training.tuners.sara.entry import Entry
from diffplug.training.tuners.sara.sara import SaRA
from diffplug.training.tuners.settings import TunerSettings

__all__ = ["SaraTuner"]


class SaraTuner:
    """Vectors of the smallest weights, under the names of their tensors.

    The weights follow the vectors before each forward.
    """

    def __init__(self, told: TunerSettings) -> None:
        self.told = told
        self.sara: SaRA | None = None

    def attach(self, denoiser: nn.Module) -> None:
        """Choose the weights, and freeze all others."""
        told = self.told
        self.sara = SaRA(
            {"denoiser": denoiser.eval()},
            density=told.density,
            budget=told.budget,
            threshold=told.threshold,
            score=told.score,
            per_layer=told.per_layer,
            include=told.include,
            exclude=told.exclude,
            include_1d=told.include_1d,
        )

    @property
    def _sara(self) -> SaRA:
        assert self.sara is not None, "attach the tuner first"  # noqa: S101 - an order of our own calls
        return self.sara

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The vectors by the names of their tensors."""
        return {entry.name: entry.vector for entry in self._sara.entries}

    def placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors with these vectors in them; gradients reach the vectors."""
        return {entry.name: _whole(entry, weights[entry.name]) for entry in self._sara.entries}

    def original(self) -> AbstractContextManager[None]:
        """Return a block in which the denoiser has its first weights."""
        return self._sara.original()

    def updated(self, update: int) -> None:
        """Nothing to do: the weights follow before the next forward."""

    def load(self, path: Path) -> None:
        """Take the vectors of a file that was trained with the same choice of weights on the same base."""
        delta = load_delta(path)
        found = next(iter(delta.components.values()))
        odd = [e.name for e in self._sara.entries if not _fits(found.get(e.name), e)]
        if odd or len(found) != len(self._sara.entries):
            raise ValueError(
                f"{str(path)!r} was trained with another choice of weights "
                f"({(odd or sorted(found))[0]} differs): take the same tuner.density and the same model"
            )
        with torch.no_grad():
            for entry in self._sara.entries:
                entry.vector.copy_(entry.before.to(entry.vector) + found[entry.name].values.to(entry.vector))
        self._sara.write()

    def delta(self, pipe: Any, weights: Mapping[str, Tensor]) -> SparseDelta:
        """Return what the vectors `weights` differ by, for the pipeline's denoiser."""
        vectors = {f"denoiser.{name}": value for name, value in weights.items()}
        found, component = self._sara.delta(vectors), component_of(pipe)
        (deltas,), (kind,) = found.components.values(), found.classes.values()
        return SparseDelta({component: deltas}, {component: kind}, found.info)

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `adapter.sara.safetensors`."""
        file = save_delta(self.delta(pipe, weights), folder / "adapter", dtype=self.told.save_dtype)
        return {"kind": "sara", "file": file.name}


def _fits(delta: Any, entry: Entry) -> bool:
    return delta is not None and torch.equal(delta.index, entry.index.cpu())


def _whole(entry: Entry, vector: Tensor) -> Tensor:
    """Return a tensor with a vector's values at its trained entries, and its own elsewhere."""
    own = local(entry.weight.detach())
    before = entry.before.to(vector.dtype)
    values = (before + (vector - before)).to(own.dtype)
    return own.reshape(-1).index_copy(0, entry.index.long(), values).view(own.shape)
