"""D3PO (arXiv 2311.13231): PSO's ancestor, for models of many steps.

Pairs of whole pictures, a loss for every step, ratios held on both sides. With the published beta of 0.1 the
logit never leaves +-0.02, so the loss stays at log 2 throughout: read `accuracy` and `reward`. On few-step
models it has no anchor and blurs; take `pso`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffplug.training.objectives.preference.pso import PSO, PSOSettings
from diffplug.training.preference.pair_loss import Clip

__all__ = ["D3PO", "D3POSettings"]


@dataclass(frozen=True, kw_only=True)
class D3POSettings(PSOSettings):
    """As published."""

    beta: float = 0.1
    reduce: Literal["auto", "trajectory", "step"] = "step"
    clip: Clip = "two_sided"
    anchor: float | None = 0.0
    start: Literal["shared", "independent"] = "independent"


class D3PO(PSO):
    """PSO's loss with D3PO's settings, at 20 steps."""

    Settings = D3POSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "student": {"steps": 20},
        "run": {"batch": 16, "updates": 400},
        "optimizer": {"lr": 3e-5, "warmup": 1, "floor": 1.0, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }
