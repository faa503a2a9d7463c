"""DPOK (arXiv 2305.16381): a policy gradient held to the start model by the divergence of every step.

The divergence is in closed form, omega |x0hat - x0hat_ref|^2. It does not reach the last, deterministic step
of a few-step model: give objective.anchor there.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffplug.training.objectives.preference.policy_gradient import PolicyGradient, PolicySettings

__all__ = ["DPOK", "DPOKSettings"]


@dataclass(frozen=True, kw_only=True)
class DPOKSettings(PolicySettings):
    """kl: 0.01 for divergences averaged over dimensions."""

    kl: float = 0.01


class DPOK(PolicyGradient):
    """A policy gradient with a divergence."""

    Settings = DPOKSettings
