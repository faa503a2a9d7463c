"""What the steerers share that tilt the pipeline's law by exp(strength * reward): options and streams."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from diffplug.seeds import particle_seed
from diffplug.steering.engine.rule import Filter
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.potentials import Adaptive, Potential, potential
from diffplug.steering.smc.resampling import Selector
from diffplug.steering.steerer import Selecting, prompt_seeds


@dataclass(frozen=True)
class Tilted(Selecting):
    """Base of steerers with a strength.

    strength: lambda >= 0. What matters is strength times the spread of the reward over free samples: 1 to 3
    is moderate. 0 never scores and is the plain pipeline with `num_images_per_prompt=particles`. tilt:
    "rising" (the potential grows with the progress of the run), "constant", or "adaptive", which is
    `Adaptive(0.5)` (as much as keeps the effective sample size at that share of the particles; at the end it
    is always the full strength). seed, proposal: see `Selecting`.
    """

    _: KW_ONLY
    strength: float = 10.0
    tilt: str | Adaptive = "rising"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._potential()

    @property
    def weight(self) -> float:
        """Return the strength."""
        return float(self.strength)

    @property
    def scores(self) -> bool:
        """Return whether the strength is above zero."""
        return self.strength > 0

    def _potential(self, name: str = "difference") -> Potential:
        if isinstance(self.tilt, Adaptive):
            target = self.tilt.target_ess
            return potential(name, strength=self.strength, tilt="adaptive", target_ess=target)
        return potential(name, strength=self.strength, tilt=self.tilt)

    def _filter(
        self,
        groups: int,
        *,
        resampler: str | Selector,
        ess_threshold: float | None,
        islands: int = 1,
        second_level: float | None = None,
        potential: Potential | None = None,
    ) -> Filter:
        """Return a filter of so many islands per prompt, each with its own stream.

        The stream of island 0 is the prompt's own, so that one island is the plain filter.
        """
        seeds = prompt_seeds(self.seed, groups)
        inner = ParticleFilter(
            groups=groups * islands,
            particles=self.particles // islands,
            potential=self._potential() if potential is None else potential,
            generators=[_stream(seed, j) for seed in seeds for j in range(islands)],
            resampler=resampler,
            ess_threshold=ess_threshold,
        )
        if islands == 1:
            return inner
        above = [_stream(seed, islands) for seed in seeds]
        return Islands(inner, groups=groups, generators=above, ess_threshold=second_level)


def _stream(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(particle_seed(seed, index))


def check_split(particles: int, name: str, size: int) -> None:
    """Raise ValueError unless `size`, the option `name`, is a whole number that divides the particles."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or particles % size:
        raise ValueError(
            f"{name}={size!r} does not divide particles={particles}: give a divisor of it, or other particles"
        )
