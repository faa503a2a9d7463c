"""The one-step finish: distribution matching for a student of one evaluation, held by a regression.

DMD's gradient (arXiv 2311.18828, 2405.14867) without discriminator and pictures, and the squared error to the
teacher's stored end point from the same noise, as Hyper-SD's one-step enhancement has it (2404.13686, 3.3).
The regression keeps noise and picture paired: without it the score distillation re-pairs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffplug.training.objectives.distribution_matching import (
    DistributionSettings,
    Terms,
    TrajectoryDistribution,
    dmd_loss,
)

__all__ = ["OneStep", "OneStepSettings"]


@dataclass(frozen=True, kw_only=True)
class OneStepSettings(DistributionSettings):
    """As those of `tdm`, with the anchor on."""

    anchor: float = 0.25


class OneStep(TrajectoryDistribution):
    """A student of one evaluation; start it from a student that is trained already (student.start)."""

    Settings = OneStepSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"precision": "bf16", "batch": 32},
        "student": {"steps": 1},
        "optimizer": {"lr": 1e-4, "floor": 0.1, "warmup": 10},
    }

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for a student of more steps."""
        if job.config.student.steps != 1:
            raise ValueError(
                f"one-step is for student.steps=1, got {job.config.student.steps}: take tdm for more steps"
            )

    def student_loss(self, x0: Tensor, found: Terms) -> Tensor:
        """Return DMD's loss of each row."""
        return dmd_loss(x0, found)
