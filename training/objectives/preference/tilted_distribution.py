"""Reward-tilted distillation: distribution matching whose target prefers what a reward prefers.

    L = L_tdm + tilt relu(threshold - r(decode(x0), prompt))        in the student's last step

The optimum is the teacher's distribution times exp(r tilt) rather than the teacher's own. The two terms hold
each other: matching keeps pictures sharp and plausible where the reward alone would find blind spots. Needs a
teacher, so it is for the time when a student is distilled; `pso` tunes a student that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffplug import rewards
from diffplug.latents import decode
from diffplug.training.conditions import Conditions
from diffplug.training.objective import Rows
from diffplug.training.objectives.distribution_matching import (
    DistributionSettings,
    Terms,
    TrajectoryDistribution,
)
from diffplug.training.objectives.preference.reward_feedback import differentiable, hinge

__all__ = ["TiltedDistribution", "TiltedSettings"]


@dataclass(frozen=True, kw_only=True)
class TiltedSettings(DistributionSettings):
    """As those of `tdm`, with reward: one with a gradient; tilt: its weight; threshold: good enough."""

    reward: str = "shapes-clip"
    tilt: float = 0.1
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tilt > 0:
            raise ValueError(f"tilt must be above 0, got {self.tilt}: without a reward take tdm")


class TiltedDistribution(TrajectoryDistribution):
    """`tdm` with a reward on the last step's pictures."""

    Settings = TiltedSettings
    needs_pipe = True
    pipe: Any = None
    reward: Any = None
    prompts: list[str]
    _words: list[str]

    @classmethod
    def from_job(cls, job: Any) -> TiltedDistribution:
        """Return the objective of `diffplug train tilted`."""
        made = super().from_job(job)
        assert isinstance(made, cls)  # noqa: S101 - for the type checker
        made.pipe, made.prompts, made.reward = job.pipe, job.prompts, differentiable(job.objective.reward)
        return made

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for a reward without a gradient."""
        differentiable(job.objective.reward)

    def _state(self, rows: Rows, j: int) -> tuple[Tensor, Conditions, tuple[Tensor, Tensor] | None]:
        last = j == len(self.edges) - 2
        self._words = [self.prompts[i] for i in rows.items(len(self.conditions)).tolist()] if last else []
        return super()._state(rows, j)

    def student_loss(self, x0: Tensor, found: Terms) -> Tensor:
        """Return the student's loss of each row, tilted in its last step."""
        loss = super().student_loss(x0, found)
        if not self._words:
            return loss
        images = decode(self.pipe, x0.to(next(self.pipe.vae.parameters()).dtype))
        scores = rewards.score(self.reward, images, self._words, graph=True).to(loss)
        return loss + self.settings.tilt * hinge(scores, self.settings.threshold)
