"""Reward feedback: a differentiable reward on what the student draws, through its last evaluation only.

    L = weight relu(threshold - r(decode(x0), prompt)) + anchor L_trajectory

The student is rolled out without gradients to its last step, whose x0 is decoded with a graph (ReFL, arXiv
2304.05977; Hyper-SD's human feedback, 2404.13686, section 3.2). The hinge stops pushing once the reward is
good enough; matching the teacher's trajectories meanwhile keeps the pictures what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.latents import decode
from diffplug.training.network import Network
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.objectives.trajectory_matching import TrajectoryMatching
from diffplug.training.trajectories import Trajectories

__all__ = ["FeedbackSettings", "RewardFeedback", "hinge"]


@dataclass(frozen=True, kw_only=True)
class FeedbackSettings:
    """The table [objective] of `reward`.

    reward: a differentiable one ("shapes-clip", "0.7*clip+0.3*aesthetic"). threshold: scores above it are
    good enough. weight: of the hinge. anchor: of trajectory matching.
    """

    reward: str = "shapes-clip"
    threshold: float = 1.0
    weight: float = 1.0
    anchor: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.anchor < 0:
            raise ValueError(
                f"weight must be above 0 and anchor at least 0, got {self.weight}, {self.anchor}"
            )


class RewardFeedback(Objective):
    """Trains `network` by `reward`, and on trajectories of `segments` steps whose prompts it draws."""

    Settings = FeedbackSettings
    needs_pipe = True
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"precision": "bf16", "batch": 16},
        "optimizer": {"lr": 2e-5},
    }

    def __init__(
        self,
        network: Network,
        data: Trajectories,
        segments: int,
        settings: FeedbackSettings,
        *,
        pipe: Any,
        reward: Any,
    ) -> None:
        self.network, self.data, self.settings, self.pipe, self.reward = network, data, settings, pipe, reward
        self.matching = TrajectoryMatching(network, data, segments)

    @classmethod
    def from_job(cls, job: Any) -> RewardFeedback:
        """Return the objective of `diffplug train reward`."""
        steps, told = job.config.student.steps, job.objective
        reward = differentiable(told.reward)
        return cls(job.network, job.trajectories(steps), steps, told, pipe=job.pipe, reward=reward)

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for a reward without a gradient."""
        differentiable(job.objective.reward)

    @staticmethod
    def needs_store(job: Any) -> bool:
        """For the anchor."""
        return True

    def groups(self) -> list[Group]:
        """The student."""
        return self.matching.groups()

    def loss(self, rows: Rows) -> Loss:
        """Return hinge plus anchor of each row."""
        scores = self._scores(rows)
        missing = hinge(scores, self.settings.threshold).to(rows.device)
        log = {"reward": scores.detach().mean().to(rows.device)}
        if not self.settings.anchor:
            return Loss(self.settings.weight * missing, log=log)
        anchor = self.matching.loss(rows)
        errors = self.settings.weight * missing + self.settings.anchor * anchor.errors
        return Loss(errors, log={**log, **anchor.log}, totals=anchor.totals, timesteps=anchor.timesteps)

    def _scores(self, rows: Rows) -> Tensor:
        """Return the rewards [n] of fresh pictures, with a graph through the last evaluation."""
        path, edge = self.network.path, self.matching.edges
        item = rows.items(len(self.data))
        conditions = self.data.conditions[item].to(rows.device)
        x = rows.normal(*self.data.states.shape[2:])
        with torch.no_grad():
            for j in range(len(edge) - 2):
                said = self.network(x, edge[j].expand(len(rows)), conditions)
                x = path.jump(said, edge[j + 1].expand(len(rows)))
        x0 = self.network(x, edge[-2].expand(len(rows)), conditions).x0
        images = decode(self.pipe, x0.to(next(self.pipe.vae.parameters()).dtype))
        prompts = [self.data.prompts[i] for i in item.tolist()]
        return rewards.score(self.reward, images, prompts, graph=True).float()

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Follow the anchor's errors."""
        self.matching.updated(update, totals)

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor's running errors."""
        return self.matching.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.matching.load_state_dict(state)


def differentiable(spec: str) -> Any:
    """Return the reward of that name; ValueError for one without a gradient."""
    reward = rewards.get(spec)
    if not getattr(reward, "differentiable", False):
        raise ValueError(
            f"objective.reward {spec!r} has no gradient: take a network's, as shapes-clip, clip or aesthetic"
        )
    return reward


def hinge(scores: Tensor, threshold: float) -> Tensor:
    """Return relu(threshold - score): zero, and without gradient, where a score is good enough."""
    return (threshold - scores).clamp(min=0)
