"""DDPO (arXiv 2305.13301): a clipped policy gradient without a reference.

Nothing holds it to the start model: on few-step models it blurs sooner than methods that compare, so keep an
eye on the gauges, or give objective.anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffplug.training.objectives.preference.policy_gradient import PolicyGradient, PolicySettings

__all__ = ["DDPO", "DDPOSettings"]


@dataclass(frozen=True, kw_only=True)
class DDPOSettings(PolicySettings):
    """As published: ratios within 1e-4, no divergence term, independent starts."""

    start: Literal["shared", "independent"] = "independent"


class DDPO(PolicyGradient):
    """Advantages in standard deviations of a prompt's rewards."""

    Settings = DDPOSettings
