"""The rule chosen for a call by what was measured, and said why: `steer="auto"`.

The choice rests on Shapes (docs/steering.md): where one picture is wanted and the reward may choose it, best
of n is as good as or better than every rule that selects on the way; where several are wanted and nothing
guides, Feynman-Kac makes nearly all of them good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

from diffplug.call_arguments import asked_guidance
from diffplug.checks import check_seed
from diffplug.steering.engine.refusals import refuse_pipeline
from diffplug.steering.engine.request import read_request
from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.slots import Slots
from diffplug.steering.report import SteeringReport
from diffplug.steering.rules.best_of_n import BestOfN
from diffplug.steering.rules.feynman_kac import FeynmanKac
from diffplug.steering.steerer import Steerer

UNGUIDED = 1.0
STRONG = 2.0  # above this, less guidance gave more


@dataclass(frozen=True)
class Auto(Steerer):
    """Best of n, with an early end where the reward has a best value, or Feynman-Kac: whichever suits a call.

    particles: the most that are drawn for a prompt; None chooses 16 where drawing may end early and 8 where
    not. A reward says by an attribute `best` what it cannot exceed ("shapes": 1). seed: as in `FeynmanKac`.
    After a call `report.why` says what was chosen and why, and when less guidance may be worth a try. Other
    arguments as in `Steerer`.
    """

    _: KW_ONLY
    particles: int | None = None  # type: ignore[assignment]
    seed: int | Sequence[int] | None = None

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", self.particles)
        if self.particles is None:
            object.__setattr__(self, "particles", 16 if self._early() else 8)
        if self.seed is not None:
            check_seed(self.seed)
        super().__post_init__()

    @property
    def most(self) -> int:
        """Return how many are drawn for a prompt at most."""
        return 8 if self.particles is None else self.particles

    @property
    def weight(self) -> float:
        """Return 0: what is tilted is decided by the call."""
        return 0.0

    def plan(self) -> Plan:
        """Return the plan of best of n; a call decides for itself."""
        return self._best_of_n(early=False).plan()

    def build_filter(self, groups: int) -> Filter:
        """Return the filter of best of n; a call decides for itself."""
        return self._best_of_n(early=False).build_filter(groups)

    def no_crowd(self) -> str:
        """Return why it cannot choose for a loop: it does not see its guidance."""
        return "it chooses by a pipeline's call; name the rule, as FeynmanKac or BestOfN"

    def chosen(self, pipe: Any, wanted: int, guidance: float | None) -> tuple[Steerer, str]:
        """Return the rule for a call, and the reason in words.

        wanted: pictures of a prompt. guidance: guidance_scale, None where a pipeline has none.
        """
        guided = guidance is not None and guidance > UNGUIDED
        drawn = self.returns == "sample"
        if (drawn or (not guided and (wanted > 1 or self.returns == "all"))) and self._copyable(pipe):
            said = (
                "auto: Feynman-Kac, since pictures are drawn by weight"
                if drawn
                else "auto: Feynman-Kac, since several pictures are wanted and nothing guides: nearly all "
                "particles end well"
            )
            return self._feynman_kac(), said + _advice(guidance)
        early = self._early() and self.returns == "best" and not self.network.ranks
        what = f"best of {self.most}"
        if early:
            what = f"best of at most {self.most}, drawn until a picture has {self._best():g}"
        why = (
            "under guidance free draws were ahead of every rule that selects on the way"
            if guided
            else "the reward chooses one picture, and free draws cost least"
        )
        return self._best_of_n(early=early), f"auto: {what}, since {why}{_advice(guidance)}"

    def _best(self) -> float | None:
        return getattr(self.reward, "best", None)

    def _early(self) -> bool:
        return isinstance(self._best(), (int, float))

    def _best_of_n(self, *, early: bool) -> BestOfN:
        return BestOfN(
            self.reward,
            particles=self.most,
            returns="best" if self.returns == "sample" else self.returns,
            scoring=self.scoring,
            network=self.network,
            enough=self._best() if early else None,
        )

    def _feynman_kac(self) -> FeynmanKac:
        particles = 8 if getattr(self, "asked", None) is None else self.most
        return FeynmanKac(
            self.reward,
            particles=particles,
            returns=self.returns,
            scoring=self.scoring,
            network=self.network,
            seed=self.seed,
        )

    @staticmethod
    def _copyable(pipe: Any) -> bool:
        try:
            refuse_pipeline(pipe)
        except ValueError:
            return False
        return True

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        wanted = read_request(pipe, {**kwargs, "generator": None, "latents": None}, Slots(self.most)).wanted
        rule, why = self.chosen(pipe, wanted, asked_guidance(pipe, kwargs))
        output = rule._around(pipe, call, kwargs)
        found: SteeringReport | None = rule.report
        if found is not None:
            self._reports[:] = [replace(found, why=why)]
        return output


def _advice(guidance: float | None) -> str:
    """Return a sentence on guidance where less of it was better."""
    if guidance is None or guidance <= STRONG:
        return ""
    return (
        f". Guidance is {guidance:g}: on Shapes best of 8 is right in 80 % at 5, 89 at 2, 92 without, so try "
        "less where the reward may choose"
    )
