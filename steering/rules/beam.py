"""Beam search: the best few particles go on, with equally many copies each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from diffplug.steering.engine.score_times import Plan, plan_of
from diffplug.steering.engine.step import Filter
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import beam
from diffplug.steering.steerer import Steerer


@dataclass(frozen=True)
class Beam(Steerer):
    """At every scored call the `width` best of the k particles survive, with k / width copies each.

    A maximiser, not a sampler: it needs no strength, any increasing function of the reward gives the same
    pictures, and there are no weights. It follows the judgement of early clean predictions without doubt; the
    later calls are the safer ones. width: by default half of the particles (1 for a single one). score_at:
    fractions of the run in (0, 1], or "every". The rest: see `Steerer`; returns is "best" or "all". Raises
    ValueError for a width that does not divide the particles.
    """

    _: KW_ONLY
    width: int | None = None
    score_at: Sequence[float] | str = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        plan_of(self.score_at)
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
        return plan_of(self.score_at)

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that keeps the best few."""
        return ParticleFilter(
            groups=groups,
            particles=self.particles,
            potential=Difference(strength=1.0, tilt="constant"),
            generators=[torch.Generator()],
            resampler=beam(self.kept),
        )
