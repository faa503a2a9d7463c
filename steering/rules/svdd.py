"""SVDD: soft value-based decoding (arXiv 2408.08252), CoDe (arXiv 2502.00968), and two levels of both.

Groups of M candidates: at each selecting call one of them survives, by softmax of its value, and the other
slots become copies of it that part in the noise of that step. In the language of particle filters that is
resampling with a single survivor, so every group carries an importance weight

    lw += log mean_m exp(strength v_m) - strength v_(last survivor)

with which the outputs are exact for every M and every value: E[exp(lw) f(x)] = Z E_tilted[f(x)].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.score_times import every_block
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.rules.tilted import Tilted, check_split
from diffplug.steering.smc.filter import check_threshold
from diffplug.steering.smc.potentials import Adaptive
from diffplug.steering.smc.resampling import kl_bound, one_survivor, the_best


@dataclass(frozen=True)
class OneSurvivor(Tilted):
    """Base of steerers with groups of `duplicates` candidates, one of which survives every `block` calls.

    duplicates: M candidates per group, by default all particles. block: calls between selections, counted
    back from the finished pictures. Raises ValueError for duplicates that do not divide the particles.
    """

    _: KW_ONLY
    duplicates: int | None = None
    block: int = 1
    tilt: str | Adaptive = "constant"

    needs_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split(self.particles, "duplicates", self.candidates)
        every_block(self.block)

    @property
    def candidates(self) -> int:
        """Return M, the candidates of a group."""
        return self.particles if self.duplicates is None else self.duplicates

    def plan(self) -> Plan:
        """Return the plan of selecting calls."""
        return every_block(self.block)


@takes_old_keywords
@dataclass(frozen=True)
class SVDD(OneSurvivor):
    """Pictures each of which was pushed on its own: in every group one of `duplicates` candidates survives.

    Costs k network rows per prompt and call, as k free pictures do, and k decodings and rewards for each
    selecting call: with the default of every call that is the main cost, so raise `block` or give a `preview`
    decoder. Groups share no ancestor; the k = particles of a prompt are k / duplicates groups.

    strength: 1 / alpha, where alpha is the temperature of the paper. duplicates, block: see `OneSurvivor`.
    greedy: the best candidate survives; this ignores strength, has no weights, and can leave the pipeline's
    law by up to n (log M - 1 + 1/M) nats for n selections (a warning says how far). tilt: "constant" here,
    which gives the higher rewards; with "rising" the weighted estimates are better. returns: "best" gives the
    best candidate of each group first, "sample" draws by the weights. A run without any noise is refused with
    a ValueError: all candidates would be the same. The rest: see `Tilted` and `Steerer`.

        with plug(pipe, SVDD(reward, particles=8, duplicates=4)):    # two groups of four
            images = pipe("a red circle", num_images_per_prompt=2).images
    """

    _: KW_ONLY
    greedy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.greedy and self.returns == "sample":
            raise ValueError("greedy selection leaves no weights to draw by: choose returns='best' or 'all'")

    def plan(self) -> Plan:
        """Return the plan of selecting calls; the greedy one warns of its divergence."""
        return self._warned(super().plan()) if self.greedy else super().plan()

    def _warned(self, plan: Plan) -> Plan:
        def warning_plan(n: int) -> Iterable[int]:
            calls = list(plan(n))
            selections, m = len(calls) + 1, self.candidates
            if m > 1:
                warnings.warn(
                    f"greedy selection {selections} times among {m} candidates can move the pictures' law by "
                    f"up to {kl_bound(m, selections):.1f} nats (best of {m}: {kl_bound(m, 1):.1f}): "
                    "greedy=False, a larger block or fewer duplicates stay nearer to the pipeline",
                    stacklevel=2,
                )
            return calls

        return warning_plan

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter, one survivor per group. Raises ValueError for a wrong number of seeds."""
        return self._filter(
            groups,
            resampler=the_best if self.greedy else one_survivor,
            ess_threshold=None,
            islands=self.particles // self.candidates,
        )


@takes_old_keywords
@dataclass(frozen=True)
class CoDe(SVDD):
    """SVDD that selects every few calls: fewer rewards, and pictures nearer to the pipeline's own.

    block: 5 by default. Everything else as in `SVDD`.
    """

    _: KW_ONLY
    block: int = 5


@takes_old_keywords
@dataclass(frozen=True)
class TwoLevel(OneSurvivor):
    """SVDD within groups, and whole groups of a prompt resampled by their importance weights.

    The particle filter with the most lineages at equal network rows: its outputs, weighted, are from the
    tilted law. duplicates: M = 2 by default. ess_threshold: groups are resampled where their effective number
    is below this share of them. tilt: "rising" by default. Everything else as in `SVDD`, without greedy.
    Raises ValueError for a threshold outside (0, 1].
    """

    _: KW_ONLY
    duplicates: int | None = 2
    tilt: str | Adaptive = "rising"
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ess_threshold is None:
            raise ValueError("ess_threshold=None: give a share in (0, 1], or SVDD, whose groups never meet")
        check_threshold(self.ess_threshold)

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter of two levels. Raises ValueError for a wrong number of seeds."""
        return self._filter(
            groups,
            resampler=one_survivor,
            ess_threshold=None,
            islands=self.particles // self.candidates,
            second_level=self.ess_threshold,
        )
