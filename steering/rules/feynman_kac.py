"""Feynman-Kac steering: particles are selected on the way by their clean predictions (arXiv 2501.06848)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.score_times import no_call, plan_of
from diffplug.steering.noise_choice import Asked
from diffplug.steering.parts import RESAMPLING, Resampling, takes_old_keywords
from diffplug.steering.rules.tilted import Tilted, check_split
from diffplug.steering.smc.potentials import potential

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)


@takes_old_keywords
@dataclass(frozen=True)
class FeynmanKac(Tilted):
    """Pictures from the pipeline's law tilted by exp(strength * reward).

    Costs k times the network of the plain pipeline, and k decodings and rewards for each scored call.

    k particles per prompt are denoised together; at the calls of `scoring.at` (default: five, evenly spread)
    each is scored on its clean prediction and the population is resampled, so evaluations move from bad to
    promising trajectories. The weights are those of an exact particle filter over the chain's own
    transitions. Duplicates part in noise: that of the solver, or churn where it adds none (see `proposal`).

    potential: "difference", "max-increment", "max" or "sum" of the rewards so far; all end at the same tilted
    law. scoring: at=1.0 stands for the finished pictures, which are scored in any case; at=() is importance
    sampling. selection: scheme, ESS threshold and islands, a `Resampling`. With a given number of islands
    "best" returns the best of each first, so that pictures asked for together share no ancestor. strength,
    tilt: see `Tilted`. seed, proposal: see `Selecting`. The rest: see `Steerer`. After a call `report` is a
    SteeringReport.

        with plug(pipe, FeynmanKac("shapes", particles=8)):
            image = pipe("a red circle", num_inference_steps=20).images[0]
    """

    _: KW_ONLY
    potential: str = "difference"
    selection: Resampling = RESAMPLING

    times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        potential(self.potential, strength=self.strength)
        if not isinstance(self.selection, Resampling):
            raise ValueError(f"selection={self.selection!r}: give a Resampling(...)")
        check_split(self.particles, "islands", self.islands)

    @property
    def islands(self) -> int:
        """Return how many islands there are: those asked for, or pairs where particles are even."""
        if self.selection.islands is not None:
            return self.selection.islands
        return 1 if self.particles % 2 else self.particles // 2

    @property
    def leaders_first(self) -> bool:
        """Return whether islands were asked for: those that nobody asked for do not change the order."""
        return self.selection.islands is not None

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        return plan_of(FRACTIONS if self.scoring.at is None else self.scoring.at)

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter. Raises ValueError for a wrong number of seeds."""
        return self._filter(
            groups,
            resampler=self.selection.scheme,
            ess_threshold=self.selection.ess_threshold,
            islands=self.islands,
            potential=self._potential(self.potential),
        )


@takes_old_keywords
@dataclass(frozen=True)
class ImportanceSampling(Tilted):
    """Free pictures, weighted by exp(strength * reward): Feynman-Kac without any selection on the way.

    Costs k times the pipeline and one scoring; works with every solver. The weights and log Z are unbiased
    for every strength, and useless once one picture has all the weight (see the report's final ESS). Nothing
    is duplicated, so a proposal is refused. Options: see `Tilted` and `Steerer`.
    """

    _: KW_ONLY
    proposal: Asked = None

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proposal not in (None, "auto"):
            raise ValueError(
                f"ImportanceSampling duplicates nothing, so proposal={self.proposal!r} would do nothing: "
                "leave it out"
            )
        object.__setattr__(self, "proposal", None)

    def plan(self) -> Plan:
        """Return the plan that scores nothing before the end."""
        return no_call

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that never selects."""
        return self._filter(groups, resampler="systematic", ess_threshold=None)
