"""What the steerers share that tilt the pipeline's law by exp(strength * reward): options and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_seed
from diffplug.noise.stochastic import adds_noise, takes_churn
from diffplug.seeds import particle_seed
from diffplug.steering.engine.step import Filter
from diffplug.steering.proposals import Churn, Proposal, check_eta
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.potentials import Potential, potential
from diffplug.steering.smc.resampling import Selector
from diffplug.steering.steerer import Steerer


@dataclass(frozen=True)
class Tilted(Steerer):
    """Base of steerers with a strength.

    strength: lambda >= 0. What matters is strength times the spread of the reward over free samples: 1 to 3
    is moderate. 0 never scores and is the plain pipeline with `num_images_per_prompt=particles`. tilt:
    "rising" (the potential grows with the progress of the run), "constant", or "adaptive" (as much as keeps
    the effective sample size at `target_ess` of the particles; at the end it is always the full strength).
    seed: of the selections, apart from the pipeline's noise; prompt g takes seed + g, or entry g of a
    sequence. churn: eta in (0, 1] adds noise at the scored calls, for solvers that add none themselves (see
    `diffplug.steering.churn`); 0 adds none.
    """

    _: KW_ONLY
    strength: float = 10.0
    tilt: str = "rising"
    target_ess: float = 0.5
    seed: int | Sequence[int] = 0
    churn: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._potential()
        check_seed(self.seed)
        if self.churn != 0:
            check_eta(self.churn)

    @classmethod
    def noise_for(cls, scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to add to a steerer's options for noise under this scheduler: churn where it adds none.

        Churn leaves the solver what it is but for the scored calls. Empty where nothing is needed, or nothing
        helps.
        """
        wanted = cls.copies and not adds_noise(scheduler) and takes_churn(scheduler)
        return {"churn": 1.0} if wanted else {}

    @property
    def weight(self) -> float:
        """Return the strength."""
        return float(self.strength)

    @property
    def scores(self) -> bool:
        """Return whether the strength is above zero."""
        return self.strength > 0

    def build_proposal(self, gradient: Callable[[Tensor], Tensor]) -> Proposal | None:
        """Return the churn that was asked for."""
        if not self.churn:
            return None
        return Churn(self.churn, lambda groups: prompt_seeds(self.seed, groups))

    def _potential(self, name: str = "difference") -> Potential:
        return potential(name, strength=self.strength, tilt=self.tilt, target_ess=self.target_ess)

    def _filter(
        self,
        groups: int,
        *,
        resampler: str | Selector,
        ess_threshold: float | None,
        populations: int = 1,
        second_level: float | None = None,
        potential: Potential | None = None,
    ) -> Filter:
        """Return a filter of `populations` populations per prompt, each with its own stream.

        The stream of population 0 is the prompt's own, so that one population is the plain filter.
        """
        seeds = prompt_seeds(self.seed, groups)
        inner = ParticleFilter(
            groups=groups * populations,
            particles=self.particles // populations,
            potential=self._potential() if potential is None else potential,
            generators=[_stream(seed, j) for seed in seeds for j in range(populations)],
            resampler=resampler,
            ess_threshold=ess_threshold,
        )
        if populations == 1:
            return inner
        above = [_stream(seed, populations) for seed in seeds]
        return Islands(inner, groups=groups, generators=above, ess_threshold=second_level)


def prompt_seeds(seed: int | Sequence[int], groups: int) -> list[int]:
    """Return one seed for each prompt: seed + g, or entry g. Raises ValueError for a wrong number of them."""
    if isinstance(seed, int):
        return [seed + g for g in range(groups)]
    if len(seed) != groups:
        raise ValueError(
            f"{len(seed)} selection seeds for {groups} prompts: give one number, or one for each prompt"
        )
    return list(seed)


def _stream(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(particle_seed(seed, index))


def check_split(particles: int, name: str, size: int) -> None:
    """Raise ValueError unless `size`, the option `name`, is a whole number that divides the particles."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or particles % size:
        raise ValueError(
            f"{name}={size!r} does not divide particles={particles}: give a divisor of it, or other particles"
        )
