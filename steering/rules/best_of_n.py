"""Best of n: draw n free pictures per prompt, keep those with the best reward. Every steerer's baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch

from diffplug import rewards
from diffplug.checks import check_whole
from diffplug.rewards import Reward
from diffplug.steering.engine.early_end import PortionedRun, Until
from diffplug.steering.engine.refusals import refuse_second_run
from diffplug.steering.engine.rule import Plan
from diffplug.steering.engine.score_times import no_call
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.steerer import Steerer


@takes_old_keywords
@dataclass(frozen=True)
class BestOfN(Steerer):
    """The best of `particles` free pictures per prompt, at that many times the pipeline's cost plus one
    scoring; fewer where a picture is good enough before.

    Works with every solver, deterministic ones too. The final weights are equal: nothing is tilted on the
    way. enough: a reward with which a prompt is done; pictures are then drawn in portions of `batch` (1 by
    default), and prompts that are done are left out of the next. With seeds (`Seeds`, or a generator for each
    picture) the draws are those of the full pool, and so is the picture handed back where one is reached.
    seconds: draw until the time is up, never more than `particles`. judge: a second reward, or its name, that
    chooses nothing; `report.judge_rewards` shows whether what the first one likes is liked at all. Other
    arguments as in `Steerer`; returns is "best" or, without an early end, "all". After a call `report` is a
    SteeringReport, with `draws`, `ties` and seconds.

        with plug(pipe, Seeds(0), BestOfN("shapes", particles=16, enough=1.0)):
            image = pipe("a red circle left of a blue square").images[0]
    """

    _: KW_ONLY
    batch: int | None = None
    enough: float | None = None
    seconds: float | None = None
    judge: Reward | str | None = None

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.returns == "sample":
            raise ValueError(
                "BestOfN has equal weights, so returns='sample' would ignore the reward: use FeynmanKac"
            )
        object.__setattr__(self, "judge", checked_judge(self.judge))
        self._check_early_end()

    def _check_early_end(self) -> None:
        """Raise ValueError for options that contradict an early end, or do nothing without one."""
        self.until.check_within(self.reward)
        if self.batch is not None:
            check_whole("batch", self.batch)
            if self.batch > self.particles:
                raise ValueError(
                    f"batch={self.batch} is more than particles={self.particles}: give at most that"
                )
            if not self.until:
                raise ValueError(
                    f"batch={self.batch} draws in portions, which only an early end needs: add enough=... or "
                    "seconds=..., or leave it out (network=Network(batch_size=...) saves memory)"
                )
        if self.until and self.network.ranks:
            raise ValueError("an early end runs in one process: leave out enough and seconds, or ranks")
        if self.until and self.returns == "all":
            raise ValueError(
                "returns='all' with an early end would give every prompt another number of pictures: choose "
                "returns='best', or leave out enough and seconds"
            )

    @property
    def until(self) -> Until:
        """Return when drawing ends. Raises ValueError for a bad reward or time."""
        return Until(self.enough, self.seconds)

    def portion(self, size: int, chosen: Sequence[int]) -> BestOfN:
        """Return the rule of `size` draws of some prompts."""
        texts = self.scoring.prompts
        some = [texts[g] for g in chosen] if texts is not None and not isinstance(texts, str) else texts
        return replace(
            self,
            particles=size,
            returns="all",
            batch=None,
            enough=None,
            seconds=None,
            scoring=replace(self.scoring, prompts=some),
        )

    def no_crowd(self) -> str:
        """Return why a loop cannot end early: it runs once; empty where nothing of that kind is asked."""
        if self.until:
            return "an early end draws in portions, and a loop runs once; leave out batch, enough and seconds"
        return "judge=... rates pictures of a pipeline; rate result.all yourself" if self.judge else ""

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if not self.until:
            return super()._around(pipe, call, kwargs)
        refuse_second_run(pipe)
        run = PortionedRun(self, self.batch or 1, pipe, kwargs)
        output = run(call)
        self._reports[:] = [run.report()]
        return output

    @property
    def weight(self) -> float:
        """Return 0: no tilt."""
        return 0.0

    def plan(self) -> Plan:
        """Return the plan that scores nothing before the end."""
        return no_call

    def build_filter(self, groups: int) -> ParticleFilter:
        """Return a filter that never selects."""
        return ParticleFilter(
            groups=groups,
            particles=self.particles,
            potential=Difference(strength=0.0),
            generators=[torch.Generator()],
        )


def checked_judge(judge: Reward | str | None) -> Reward | None:
    """Return a held-out reward, by its name too. Raises ValueError for what cannot be called."""
    found: Any = rewards.get(judge) if isinstance(judge, str) else judge
    if found is not None and not callable(found):
        raise ValueError(f"judge={judge!r} cannot be called: give a function of (images, prompts) or a name")
    return found
