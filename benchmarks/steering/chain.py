"""Steered runs of a one-dimensional chain by the engine alone: the ground truth for every steerer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffplug.intercept import intercept_step
from diffplug.steering.engine.rule import Filter, Plan, Score
from diffplug.steering.engine.step import ParticleSteps
from diffplug.steering.engine.twins import DuplicateWatch
from diffplug.steering.proposals import Proposal
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference, Potential
from diffplug.testing.closed_form.chain import BETAS, GAUSSIAN, TWO_HUMPS, Mixture, ddim, denoise

__all__ = ["BETAS", "GAUSSIAN", "TWO_HUMPS", "Mixture", "Steered", "ddim", "denoise", "steer"]


@dataclass(frozen=True)
class Steered:
    """A steered run: end states `[R, k]`, log weights `[R, k]`, log normalisers `[R]`."""

    x: Tensor
    logw: Tensor
    log_z: Tensor
    engine: ParticleSteps

    def ratio(self, z: float) -> tuple[float, float, float]:
        """Return mean, standard error and standard deviation of Z_hat / Z."""
        ratio = self.log_z.exp() / z
        return float(ratio.mean()), float(ratio.std() / len(ratio) ** 0.5), float(ratio.std())

    def weighted_mean(self) -> tuple[float, float]:
        """Return the mean of the groups' weighted means, and its standard error."""
        means = (torch.softmax(self.logw, -1) * self.x).sum(-1)
        return float(means.mean()), float(means.std() / len(means) ** 0.5)


@dataclass(frozen=True)
class ChainRule:
    """A steering rule put together from its answers: particles, which calls are scored, and the filter."""

    particles: int
    calls: Plan
    filters: Callable[[int], Filter]

    def plan(self) -> Plan:
        """Return which calls are scored."""
        return self.calls

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter."""
        return self.filters(groups)


def steer(
    data: Mixture,
    reward: Callable[[Tensor], Tensor],
    *,
    strength: float,
    plan: Plan,
    groups: int,
    particles: int = 4,
    tilt: str = "constant",
    ess_threshold: float | None = None,
    resampler: str = "systematic",
    scheduler: Any = None,
    steps: int = 20,
    seed: int = 0,
    patch: Callable[[ParticleSteps], None] = lambda engine: None,
    make_filter: Callable[[int], Any] | None = None,
    watch: DuplicateWatch | None = None,
    proposal: Proposal | None = None,
    potential: Potential | None = None,
    score: Score | None = None,
    one_start: bool = False,
    stand: type[ParticleSteps] = ParticleSteps,
    **step_kwargs: Any,
) -> Steered:
    """Return a steered run of the chain by the engine alone, without a pipeline.

    score: from a scored step to what its states are worth, by default the reward of their x0.
    one_start: the particles of a group begin at the same point.
    """
    scheduler = scheduler or ddim()

    def build(count: int) -> ParticleFilter:
        return ParticleFilter(
            groups=count,
            particles=particles,
            potential=potential or Difference(strength=strength, tilt=tilt),
            generators=[torch.Generator().manual_seed(seed + 1)],
            resampler=resampler,
            ess_threshold=ess_threshold,
        )

    engine = stand(
        ChainRule(particles, plan, make_filter or build),
        score or (lambda step: reward(step.x0[:, 0])),
        watch=watch,
        proposal=proposal,
    )
    patch(engine)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups * particles, 1, dtype=torch.float64, generator=generator)
    x = x[::particles].repeat_interleave(particles, 0) if one_start else x
    if isinstance(scheduler, DDIMScheduler):
        step_kwargs = {"eta": 1.0, **step_kwargs}
    undo = intercept_step(scheduler, engine)
    x = denoise(scheduler, data, x, steps, generator=generator, **step_kwargs)
    undo()
    logw, log_z, _ = engine.filter.finish(reward(x[:, 0]))
    return Steered(x.reshape(groups, particles), logw, log_z, engine)
