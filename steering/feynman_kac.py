"""Feynman-Kac steering: particles are selected on the way by their clean predictions (arXiv 2501.06848)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from diffplug.steering.particle_filter import ParticleFilter, check_threshold
from diffplug.steering.particles import Plan, every_call, scored_calls
from diffplug.steering.potentials import Difference
from diffplug.steering.resampling import check_resampler
from diffplug.steering.steerer import Steerer

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class FeynmanKac(Steerer):
    """Pictures from the pipeline's law tilted by exp(strength * reward).

    Costs k times the network of the plain pipeline, and k decodings and rewards for each scored call.

    k particles per prompt are denoised together; at the calls of `score_at` each is scored on its clean
    prediction and the population is resampled, so evaluations move from bad to promising trajectories. The
    weights are those of an exact particle filter over the solver's own transitions: use a stochastic solver,
    or copies stay identical (a warning says so).

    strength: lambda >= 0. What matters is strength times the spread of the reward over free samples: 1 to 3
    is moderate. 0 never scores and is the plain pipeline with `num_images_per_prompt=particles`. tilt:
    "rising" (the potential grows with the progress of the run) or "constant". score_at: fractions of the run
    in (0, 1], or "every"; 1.0 stands for the finished pictures, which are scored in any case; () is
    importance sampling. ess_threshold: resample where the effective sample size is below this share of k,
    weights are carried otherwise; None resamples at every scored call. resampler: a name of
    `diffplug.steering.resampling.RESAMPLERS`. seed: of the selections, apart from the pipeline's noise;
    prompt g takes seed + g, or entry g of a sequence. The rest: see `Steerer`. After a call `report` is a
    SteeringReport.

        with plug(pipe, FeynmanKac("shapes", particles=8)):
            image = pipe("a red circle", num_inference_steps=20, eta=1.0).images[0]
    """

    _: KW_ONLY
    strength: float = 10.0
    tilt: str = "rising"
    score_at: Sequence[float] | str = FRACTIONS
    ess_threshold: float | None = 0.9
    resampler: str = "systematic"
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Difference(strength=self.strength, tilt=self.tilt)
        check_threshold(self.ess_threshold)
        check_resampler(self.resampler)
        _check_fractions(self.score_at)

    @property
    def weight(self) -> float:
        """Return the strength."""
        return float(self.strength)

    @property
    def scores(self) -> bool:
        """Return whether the strength is above zero."""
        return self.strength > 0

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        return every_call if isinstance(self.score_at, str) else scored_calls(self.score_at)

    def build_filter(self, groups: int) -> ParticleFilter:
        """Return a fresh difference-potential filter. Raises ValueError for a wrong number of seeds."""
        return ParticleFilter(
            groups=groups,
            particles=self.particles,
            potential=Difference(strength=self.strength, tilt=self.tilt),
            generators=[torch.Generator().manual_seed(seed) for seed in self._seeds(groups)],
            resampler=self.resampler,
            ess_threshold=self.ess_threshold,
        )

    def _seeds(self, groups: int) -> list[int]:
        if isinstance(self.seed, int):
            return [self.seed + g for g in range(groups)]
        if len(self.seed) != groups:
            raise ValueError(
                f"{len(self.seed)} selection seeds for {groups} prompts: give one number, or one for "
                "each prompt"
            )
        return list(self.seed)


def _check_fractions(score_at: Sequence[float] | str) -> None:
    """Raise ValueError unless every scored fraction is in (0, 1]."""
    if isinstance(score_at, str):
        if score_at != "every":
            raise ValueError(f"score_at={score_at!r}: give fractions of the run in (0, 1], or 'every'")
        return
    for fraction in score_at:
        if not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise ValueError(f"score_at contains {fraction}: fractions of the run lie in (0, 1]")
