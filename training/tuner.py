"""Which weights of a denoiser move, and the file that they end in.

Every objective works with every tuner. An objective calls the network by `training.network.Network`, which
puts any weights under the names of `Tuner.parameters` (averages, an earlier stage's, a second network's), so
a tuner needs no notion of teachers and targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Tuner"]


class Tuner(Protocol):
    """LoRA, full weights, SaRA, ...; one file each in `training/tuners/`."""

    def attach(self, denoiser: nn.Module) -> None:
        """Make what moves trainable (float32) and freeze the rest; adapters are put in here."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The moving parameters by their names in `denoiser.named_parameters()`; leaves of the graph."""

    def placed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the denoiser is called with in place of its own tensors, to have `weights` in it.

        Most tuners' parameters are tensors of the denoiser, and are returned as they are.
        """

    def original(self) -> AbstractContextManager[None]:
        """Return a block in which the denoiser computes what it did before `attach`; no gradients in it."""

    def updated(self, update: int) -> None:
        """Take note of an optimiser step that was made (masks, stages); most tuners have nothing to do."""

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write `weights` (as `parameters`, often their average) as a file that Diffusers loads.

        Returns what the recipe must say of it: the file's name, its kind, the scale it is loaded with.
        """
