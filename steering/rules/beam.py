"""Beam search: the best few particles go on, with equally many duplicates each."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.score_times import plan_of
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import beam
from diffplug.steering.steerer import Selecting

FRACTIONS = (0.4, 0.6, 0.8)


@takes_old_keywords
@dataclass(frozen=True)
class Beam(Selecting):
    """At every scored call the `width` best of the k particles survive, as k / width duplicates each.

    A maximiser, not a sampler: it needs no strength, any increasing function of the reward gives the same
    pictures, and there are no weights. It follows the judgement of early clean predictions without doubt; the
    later calls are the safer ones. width: by default half of the particles (1 for a single one). scoring.at:
    by default 40, 60 and 80 % of the run. seed, proposal: see `Selecting`. The rest: see `Steerer`; returns
    is "best" or "all". Raises ValueError for a width that does not divide the particles.
    """

    _: KW_ONLY
    width: int | None = None

    times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept < 1 or self.particles % self.kept:
            raise ValueError(
                f"width={self.width} does not divide particles={self.particles}: give a divisor of it"
            )
        if self.returns == "sample":
            raise ValueError("Beam has no weights to draw by: choose returns='best' or 'all'")

    @property
    def kept(self) -> int:
        """Return how many particles survive."""
        if self.width is not None:
            return self.width
        return self.particles // 2 if self.particles % 2 == 0 else 1

    @property
    def weight(self) -> float:
        """Return 0: no tilted law belongs to this rule."""
        return 0.0

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        return plan_of(FRACTIONS if self.scoring.at is None else self.scoring.at)

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that keeps the best few."""
        return ParticleFilter(
            groups=groups,
            particles=self.particles,
            potential=Difference(strength=1.0, tilt="constant"),
            generators=[torch.Generator()],
            resampler=beam(self.kept),
        )
