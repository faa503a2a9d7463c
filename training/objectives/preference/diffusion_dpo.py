"""Diffusion-DPO (arXiv 2311.12908): pairs of pictures at every timestep, for models of many steps.

    L = -log sigmoid( -beta / 2 [ (e_w - e_w,ref) - (e_l - e_l,ref) ] ),   e = mean squared error of eps

It is `pso-offline` with the weight of every timestep set to that of a plain error in eps. Few-step models are
not trained at most of these timesteps, and their predictions there are no posterior means: the published use
on SDXL-Turbo keeps to its four timesteps, which is `pso-offline`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffplug.training.objective import Rows
from diffplug.training.objectives.preference.pso_offline import OfflinePSO, OfflineSettings

__all__ = ["DiffusionDPO", "DiffusionDPOSettings"]


@dataclass(frozen=True, kw_only=True)
class DiffusionDPOSettings(OfflineSettings):
    """beta: as published, 5000 for errors averaged over dimensions."""

    beta: float = 5000.0
    anchor: float | None = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps is not None:
            raise ValueError(
                "timesteps would do nothing: diffusion-dpo trains at all of them; take pso-offline"
            )


class DiffusionDPO(OfflinePSO):
    """Uniform timesteps; omega = snr / 2 makes the error of x0 one of eps."""

    Settings = DiffusionDPOSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "student": {"steps": 20},
        "run": {"batch": 32, "updates": 1000},
        "optimizer": {"lr": 1e-5, "warmup": 50, "floor": 1.0, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }

    def levels(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return uniform indices, and half their signal-to-noise ratio."""
        index = rows.integers(1, self.network.path.train_steps + 1).double()
        alpha, sigma = self.network.path.levels(index)
        return index, (alpha / sigma).square() / 2
