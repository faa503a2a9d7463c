"""Reward gradients through the last steps: ReFL (arXiv 2304.05977) and DRaFT-K (2309.17400).

    L = -r(decode(x0), prompt) + anchor |x0hat - x0hat_ref|^2

The model draws without noise; its last `last` steps keep the graph, and the reward's gradient runs through
them and the autoencoder. A reward's gradient finds its blind spots: few-step models sharpen or blur within
some tens of updates, so that the anchor and the gauges are on by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.latents import decode
from diffplug.training.objective import Loss, Rows
from diffplug.training.objectives.preference.reward_feedback import differentiable
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.online import Drawn, Online, OnlineSettings, check_guidance
from diffplug.training.preference.scorer import PictureScorer

__all__ = ["RewardGradient", "RewardGradientSettings"]


_IDLE = ("candidates", "start", "kernel", "eta", "timesteps", "logprob", "omega_max", "patience")
"""What the methods that compare are told."""


@dataclass(frozen=True, kw_only=True)
class RewardGradientSettings(OnlineSettings):
    """The table [objective] of `draft`.

    reward: one with a gradient. last: steps that keep the graph, 1 for ReFL. anchor: weight of the squared
    difference to the start model's prediction at these steps.
    """

    reward: str = "shapes-clip"
    last: int = 1
    anchor: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < 1 or self.anchor < 0:
            raise ValueError(f"last is at least 1 and anchor at least 0, got {self.last}, {self.anchor}")


class RewardGradient(Online):
    """Direct gradients of a reward."""

    needs_noise = False
    Settings = RewardGradientSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"batch": 16, "updates": 100, "save_every": 20},
        "optimizer": {"lr": 1e-5, "warmup": 5, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for a reward without a gradient, and for more steps than there are."""
        check_guidance(job)
        plain = RewardGradientSettings()
        idle = [name for name in _IDLE if getattr(job.objective, name) != getattr(plain, name)]
        if idle:
            raise ValueError(
                f"objective.{idle[0]} would do nothing: draft compares nothing, and draws without noise on "
                "the student's own grid; leave it out"
            )
        differentiable(job.objective.reward)
        PictureScorer(job.pipe, job.objective.reward).prepare(job.prompts)
        if job.objective.last > job.config.student.steps:
            raise ValueError(
                f"objective.last is {job.objective.last}, the student has {job.config.student.steps} steps"
            )

    def loss(self, rows: Rows) -> Loss:
        """Return minus the reward of a picture for each row, and the anchor."""
        item = rows.items(len(self.prompts))
        conditions = self.conditions[item].to(rows.device)
        kernel, g = Kernel.ddim(self.network.path, len(self.kernel), 0.0), self.settings.guidance
        x, gap = rows.normal(*self.network.form.shape), torch.zeros(len(rows), device=rows.device)
        for i in range(len(kernel)):
            step = torch.full((len(rows),), i)
            with torch.set_grad_enabled(i >= len(kernel) - self.settings.last):
                x0 = kernel.predict(self.network, x, step, conditions, guidance=g)
                if x0.requires_grad and self.settings.anchor:
                    ref = kernel.predict(self.network, x, step, conditions, original=True, guidance=g)
                    gap = gap + (x0 - ref).square().flatten(1).mean(1)
                x = kernel.mean(x, x0, step)
        images = decode(self.scorer.pipe, x.to(next(self.scorer.pipe.vae.parameters()).dtype))
        words = [self.prompts[i] for i in item.tolist()]
        scores = rewards.score(self.scorer.reward, images, words, graph=True).to(rows.device).float()
        log = {"reward": scores.detach().mean(), "anchor": gap.detach().mean()}
        log |= {name: torch.tensor(value, device=rows.device) for name, value in self.looked.items()}
        totals: Mapping[str, Tensor] = {"counted": torch.tensor(float(len(rows)), device=rows.device)}
        return Loss(self.settings.anchor * gap - scores, log=log, totals=totals)

    def compared(self, drawn: Drawn) -> Loss:
        """Not used: nothing is compared."""
        raise NotImplementedError
