"""DanceGRPO (arXiv 2505.07818): groups of pictures that begin at one noise, without a reference.

Works for flow and for variance-preserving models (objective.kernel). Nothing holds it to the start model, see
`ddpo`.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffplug.training.objectives.preference.policy_gradient import PolicyGradient, PolicySettings

__all__ = ["DanceGRPO", "DanceGRPOSettings"]


@dataclass(frozen=True, kw_only=True)
class DanceGRPOSettings(PolicySettings):
    """Shared starts; noise 0.3 as published for flows (objective.eta)."""

    eta: float = 0.3


class DanceGRPO(PolicyGradient):
    """GRPO with shared starts."""

    Settings = DanceGRPOSettings
