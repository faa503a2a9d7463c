"""Policy gradients on the steps of a sampler: DDPO, DPOK, Flow-GRPO and DanceGRPO are settings of one loss.

    L = mean_n [ -A rho_n, held within 1 +- epsilon ] + kl mean_n KL_n(theta || reference)

A is a candidate's advantage within its prompt's group, rho_n = p_theta / p_old of step n. Every update draws
anew, so that p_old is the policy itself: rho is 1, and its gradient is that of log p. Sources: arXiv
2305.13301 (DDPO), 2305.16381 (DPOK), 2505.05470 (Flow-GRPO), 2505.07818 (DanceGRPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.training.objective import Loss
from diffplug.training.preference.online import Drawn, Online, OnlineSettings
from diffplug.training.preference.selectors import group_advantage

__all__ = ["PolicyGradient", "PolicySettings", "surrogate"]


@dataclass(frozen=True, kw_only=True)
class PolicySettings(OnlineSettings):
    """The table [objective] of `ddpo`, `dpok`, `flow-grpo` and `dance-grpo`.

    epsilon: how far a ratio may go. kl: weight of the divergence from the start model. advantage: the largest
    absolute advantage. anchor: weight at the deterministic steps, as for `pso`; 0 as published.
    """

    candidates: int = 8
    epsilon: float = 1e-4
    kl: float = 0.0
    advantage: float = 5.0
    anchor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be between 0 and 1, got {self.epsilon}")
        if self.kl < 0 or self.anchor < 0 or not self.advantage > 0:
            raise ValueError("kl and anchor must be at least 0, and advantage above 0")


class PolicyGradient(Online):
    """The loss that the methods share."""

    Settings = PolicySettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"batch": 8, "updates": 100, "save_every": 20},
        "optimizer": {"lr": 2e-5, "warmup": 5, "floor": 1.0, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }

    def figures(self) -> list[str]:
        """The names in the log."""
        return ["kl", "kept"]

    def compared(self, drawn: Drawn) -> Loss:
        """Return the loss of each prompt's group; a group of equal scores weighs nothing."""
        told, (n, k) = self.settings, drawn.scores.shape
        advantage = group_advantage(drawn.scores, told.advantage)
        row = advantage.abs().sum(1).nonzero()[:, 0]
        if not len(row):
            nothing = torch.zeros(n, device=drawn.paths.states.device)
            return Loss(nothing, nothing)
        which = (row[:, None] * k + torch.arange(k)).flatten()
        found = self.transitions(drawn, which, anchor=told.anchor > 0)
        a = advantage[row].flatten().to(found.ell.device)
        each = surrogate(found.ell - found.ell.detach(), a[:, None], told.epsilon)
        errors = each.mean(1) + told.kl * found.kl.mean(1) + told.anchor * found.anchor
        at = row.to(errors.device)
        mean = errors.new_zeros(n).index_add(0, at, errors.view(-1, k).mean(1))
        weights = errors.new_zeros(n).index_fill(0, at, 1.0)
        log = {"kl": found.kl.detach().mean(), "kept": torch.tensor(len(row) / n)}
        return Loss(mean, weights, log=log)


def surrogate(log_rho: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """Return max(-A rho, -A clip(rho, 1 +- epsilon)), the clipped loss of PPO (arXiv 1707.06347)."""
    rho = log_rho.exp()
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - epsilon, 1 + epsilon))
