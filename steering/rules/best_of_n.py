"""Best of n: draw n free pictures per prompt, keep those with the best reward. Every steerer's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffplug.steering.engine.rule import Plan
from diffplug.steering.engine.score_times import no_call
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.steerer import Steerer


@takes_old_keywords
@dataclass(frozen=True)
class BestOfN(Steerer):
    """The best of `particles` free pictures per prompt, at that many times the pipeline's cost plus one
    scoring.

    Works with every solver, deterministic ones too. The final weights are equal: nothing is tilted on the
    way. Arguments as in `Steerer`; returns is "best" or "all". After a call `report` is a SteeringReport.
    """

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.returns == "sample":
            raise ValueError(
                "BestOfN has equal weights, so returns='sample' would ignore the reward: use FeynmanKac"
            )

    @property
    def weight(self) -> float:
        """Return 0: no tilt."""
        return 0.0

    def plan(self) -> Plan:
        """Return the plan that scores nothing before the end."""
        return no_call

    def build_filter(self, groups: int) -> ParticleFilter:
        """Return a filter that never selects."""
        return ParticleFilter(
            groups=groups,
            particles=self.particles,
            potential=Difference(strength=0.0),
            generators=[torch.Generator()],
        )
