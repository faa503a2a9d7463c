"""Flow-GRPO (arXiv 2505.05470): groups of pictures of a flow model, drawn by its stochastic form.

The published noise of a step is 0.7 (objective.eta). Its authors draw 10 steps in training and more
afterwards; on few-step flow models it turns blurred late in training (TDM-R1 reports the same).
"""

from __future__ import annotations

from dataclasses import dataclass

from diffplug.training.objectives.preference.policy_gradient import PolicyGradient, PolicySettings

__all__ = ["FlowGRPO", "FlowGRPOSettings"]


@dataclass(frozen=True, kw_only=True)
class FlowGRPOSettings(PolicySettings):
    """kl 0.04 and noise 0.7 as published."""

    kernel: str = "flow-sde"
    eta: float = 0.7
    kl: float = 0.04


class FlowGRPO(PolicyGradient):
    """GRPO on the steps of a flow model."""

    Settings = FlowGRPOSettings
