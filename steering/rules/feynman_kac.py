"""Feynman-Kac steering: particles are selected on the way by their clean predictions (arXiv 2501.06848)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffplug.steering.engine.score_times import Plan, no_call, plan_of
from diffplug.steering.engine.step import Filter
from diffplug.steering.proposals import Proposal, Twist, check_twist
from diffplug.steering.rules.tilted import Tilted, check_split
from diffplug.steering.smc.filter import check_threshold
from diffplug.steering.smc.potentials import potential
from diffplug.steering.smc.resampling import check_resampler

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class FeynmanKac(Tilted):
    """Pictures from the pipeline's law tilted by exp(strength * reward).

    Costs k times the network of the plain pipeline, and k decodings and rewards for each scored call.

    k particles per prompt are denoised together; at the calls of `score_at` each is scored on its clean
    prediction and the population is resampled, so evaluations move from bad to promising trajectories. The
    weights are those of an exact particle filter over the solver's own transitions: use a stochastic solver,
    or copies stay identical (a warning says so).

    potential: "difference", "max-increment", "max" or "sum" of the rewards so far; all end at the same tilted
    law. score_at: fractions of the run in (0, 1], or "every"; 1.0 stands for the finished pictures, which are
    scored in any case; () is importance sampling. ess_threshold: resample where the effective sample size is
    below this share of k, weights are carried otherwise; None resamples at every scored call. resampler: a
    name of `diffplug.steering.smc.resampling.RESAMPLERS`. populations: split the k particles of a prompt into
    this many that never meet; by default into pairs (one population for an odd k). Few large populations
    descend from few start noises and stand or fall together; 1 is the published filter. "best" returns the
    best of each first where a number is given, so that pictures asked for together share no ancestor. twist:
    for differentiable rewards and stochastic solvers, lean the noise of scored steps towards the gradient by
    at most this many standard deviations (2 is a start; see `diffplug.steering.twist`); costs one decoding
    with gradient more for each scored call. spread: standard deviation of clean latents, for its slope.
    strength, tilt, target_ess, seed, churn: see `Tilted`. The rest: see `Steerer`. After a call `report` is a
    SteeringReport.

        with plug(pipe, FeynmanKac("shapes", particles=8, churn=1.0)):
            image = pipe("a red circle", num_inference_steps=20).images[0]
    """

    _: KW_ONLY
    potential: str = "difference"
    score_at: Sequence[float] | str = FRACTIONS
    ess_threshold: float | None = 0.9
    resampler: str = "systematic"
    populations: int | None = None
    twist: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        potential(self.potential, strength=self.strength)
        check_threshold(self.ess_threshold)
        check_resampler(self.resampler)
        plan_of(self.score_at)
        check_split(self.particles, "populations", self.apart)
        if self.twist != 0:
            check_twist(self.twist, self.spread)
        if self.twist and self.churn:
            raise ValueError("twist shifts the noise that a solver adds, churn replaces it: give one of them")

    @classmethod
    def noise_for(cls, scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return churn where it is needed, unless a twist leans the noise of the solver."""
        return {} if options.get("twist") else super().noise_for(scheduler, options)

    def build_proposal(self, gradient: Callable[[Tensor], Tensor]) -> Proposal | None:
        """Return the twist or the churn that was asked for."""
        if not self.twist:
            return super().build_proposal(gradient)
        return Twist(
            gradient,
            strength=self.strength,
            cap=self.twist,
            spread=self.spread,
            rising=self.tilt != "constant",
        )

    @property
    def apart(self) -> int:
        """Return how many populations there are: those asked for, or pairs where particles are even."""
        if self.populations is not None:
            return self.populations
        return 1 if self.particles % 2 else self.particles // 2

    @property
    def leaders_first(self) -> bool:
        """Return whether populations were asked for: those that nobody asked for do not change the order."""
        return self.populations is not None

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        return plan_of(self.score_at)

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter. Raises ValueError for a wrong number of seeds."""
        return self._filter(
            groups,
            resampler=self.resampler,
            ess_threshold=self.ess_threshold,
            populations=self.apart,
            potential=self._potential(self.potential),
        )


@dataclass(frozen=True)
class ImportanceSampling(Tilted):
    """Free pictures, weighted by exp(strength * reward): Feynman-Kac without any selection on the way.

    Costs k times the pipeline and one scoring; works with every solver. The weights and log Z are unbiased
    for every strength, and useless once one picture has all the weight (see the report's final ESS). Options:
    see `Tilted` and `Steerer`.
    """

    copies: ClassVar[bool] = False

    def plan(self) -> Plan:
        """Return the plan that scores nothing before the end."""
        return no_call

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that never selects."""
        return self._filter(groups, resampler="systematic", ess_threshold=None)
