"""What all steerers share: a plug whose call runs k particles per prompt and hands back chosen ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.checks import check_seed, check_whole
from diffplug.intercept import intercept_call, intercept_step
from diffplug.rewards import Reward
from diffplug.seeds import attached_seeds, picture_seeds
from diffplug.steering.crowd.crowd import Crowd, group_seeds
from diffplug.steering.crowd.refusals import refuse_in_a_loop
from diffplug.steering.engine.ranks import slots_of
from diffplug.steering.engine.refusals import refuse_caches, refuse_pipeline, refuse_second_run
from diffplug.steering.engine.request import Request, read_request
from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.slots import Slots
from diffplug.steering.noise_choice import Asked, check_proposal, choose_noise
from diffplug.steering.parts import NETWORK, SCORING, Network, Scoring, current_options, option_names
from diffplug.steering.proposals import Churn, ChurnedSteps, Proposal, Twist, TwistedSteps
from diffplug.steering.report import SteeringReport

RETURNS = ("best", "all", "sample")
S = TypeVar("S", bound="Steerer")


@dataclass(frozen=True)
class Steerer:
    """Base of all steerers. A subclass is a `Rule`: it says which calls are scored (`plan`), and how the
    particles are weighed and selected (`build_filter`).

    reward: `reward(images, prompts) -> scores`, or a registered name. particles: k copies of every prompt.
    returns: "best" gives as many pictures per prompt as the call asks for, best reward first; "sample" draws
    them from the final weights; "all" gives every particle in slot order. scoring: how unfinished particles
    are judged, a `Scoring`. network: how many rows the denoiser takes at once, and in which processes, a
    `Network`. Raises ValueError for anything out of range.
    """

    reward: Reward | str
    _: KW_ONLY
    particles: int = 8
    returns: str = "best"
    scoring: Scoring = SCORING
    network: Network = NETWORK
    _reports: list[SteeringReport] = field(default_factory=list, init=False, repr=False, compare=False)

    slot: ClassVar[str] = "steering"
    needs_noise: ClassVar[bool] = False  # refuse solvers that add none
    copies: ClassVar[bool] = True  # duplicate particles on the way, so that noise has to part them
    times: ClassVar[bool] = False  # scored calls are chosen by scoring.at

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):
            object.__setattr__(self, "reward", rewards.get(self.reward))
        if not callable(self.reward):
            raise ValueError(
                f"reward={self.reward!r} cannot be called: give a function of (images, prompts) or a "
                f"name of {rewards.names()}"
            )
        for name, kind in (("scoring", Scoring), ("network", Network)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a {kind.__name__}(...)")
        check_whole("particles", self.particles)
        if self.scoring.at is not None and not self.times:
            raise ValueError(
                f"{type(self).__name__} chooses the scored calls itself: leave at={self.scoring.at!r} out"
            )
        if self.returns not in RETURNS:
            raise ValueError(f"unknown returns {self.returns!r}: choose one of {', '.join(RETURNS)}")

    @classmethod
    def current_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as the constructor takes them, from a flat form with plain values for JSON.

        `churn`, `twist`, `score_at`, `islands`, `ess_threshold`, ... become parts without a warning.
        """
        return current_options(cls, options)[0]

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names that `current_options` takes."""
        return option_names(cls)

    @property
    def report(self) -> SteeringReport | None:
        """Return what the last call did; None before the first one."""
        return self._reports[-1] if self._reports else None

    @property
    def weight(self) -> float:
        """Return lambda of the tilt exp(lambda * reward) that the final weights stand for."""
        raise NotImplementedError

    @property
    def scores(self) -> bool:
        """Return whether the reward is needed at all."""
        return True

    @property
    def leaders_first(self) -> bool:
        """Return whether "best" gives the best of every island before any other picture."""
        return True

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        raise NotImplementedError

    def build_filter(self, groups: int) -> Filter:
        """Return fresh log weights for this many prompts, and the way to select by them."""
        raise NotImplementedError

    def build_proposal(
        self, asked: Churn | Twist | None, gradient: Callable[[Tensor], Tensor]
    ) -> Proposal | None:
        """Return what changes the steps of scored calls, if anything does.

        asked: what was chosen for this call. gradient: from clean latents to the reward's gradient, for
        rewards that have one.
        """
        return None

    def build_run(self, pipe: Any, request: Request, slots: Slots) -> SteeredRun:
        """Return the run of one call, without a proposal."""
        return SteeredRun(self, pipe, request, slots)

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Return a function that detaches this steerer from the pipeline; until then every call of `pipe` is
        steered.

        Raises ValueError, with the reason, for a pipeline that cannot be steered at a scheduler.
        """
        refuse_pipeline(pipe, copies=self.copies)
        return intercept_call(pipe, lambda call, kwargs: self._around(pipe, call, kwargs))

    def crowd(
        self,
        *,
        groups: int = 1,
        steps: int,
        seeds: int | Sequence[int] = 0,
        prompts: Sequence[Any] | None = None,
        shared: Iterable[str] = (),
        floor: float | None = None,
        device: str | torch.device = "cpu",
    ) -> Crowd:
        """Return the particles of a sampling loop of one's own; see `Crowd` for the four lines it adds.

        groups: P, results that are wanted; each has k = particles rows of its own. steps: how often the loop
        calls `crowd.at`. seeds: group g draws from seed + g, or entry g: as with `Seeds` on a pipeline.
        prompts: what the reward is told of each group, texts or labels. shared: paths of what is the same for
        all rows and stays, such as "state.table". floor: the reward of what has none yet (NaN) on the way;
        None ends such a particle, as NaN at the end always does. device: of the generators.
        Raises ValueError for options of this steerer that mean nothing in a loop.
        """
        refuse_in_a_loop(self, SCORING, NETWORK)
        check_whole("groups", groups)
        return Crowd(
            self.seeded(seeds, groups),
            groups=groups,
            steps=steps,
            seeds=seeds,
            prompts=prompts,
            shared=shared,
            floor=floor,
            device=device,
        )

    def no_crowd(self) -> str:
        """Return why this steerer cannot steer a loop of one's own; empty where it can."""
        return ""

    def seeded(self: S, seeds: int | Sequence[int], groups: int) -> S:
        """Return this steerer with these seeds for its selections, where it makes some without its own."""
        return self

    def for_call(self: S, pipe: Any, groups: int, wanted: int) -> S:
        """Return this steerer with everything decided that the call of a pipeline decides."""
        return self

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Return the output of a steered call; the scheduler is intercepted while it lasts."""
        refuse_second_run(pipe)
        if self.copies:
            refuse_caches(pipe)
        noise = choose_noise(getattr(self, "proposal", None), pipe, kwargs)
        if self.needs_noise and self.scores and noise.words == "none":
            raise ValueError(
                f"{type(pipe.scheduler).__name__} adds no noise, so all candidates of a group would be the "
                "same: leave out proposal=None, take a stochastic solver, or BestOfN, which needs none"
            )
        slots = slots_of(self.particles, self.network.ranks)
        request = read_request(pipe, {**kwargs, **noise.call}, slots)
        rule = self.for_call(pipe, request.groups, request.wanted)
        run = rule.build_run(pipe, request, slots)
        run.noise = noise.words
        proposal = rule.build_proposal(noise.proposal, run.scorer.gradient)
        if proposal is not None:
            run.engine.proposal = proposal
        undo = intercept_step(pipe.scheduler, run.engine)
        try:
            output = run(call)
        finally:
            undo()
        self._reports[:] = [run.report()]
        return output


@dataclass(frozen=True)
class Selecting(Steerer):
    """Base of steerers that duplicate particles on the way, which then part in noise.

    seed: of the selections and of churn, apart from the pipeline's noise; prompt g takes seed + g, or entry g
    of a sequence. None takes the seed of each prompt's first picture from the attached `Seeds`, so that a
    picture is the same alone and in a batch, and 0 where there are none. proposal: where the noise comes
    from: "auto" takes the solver's own, and churn at the scored calls of a solver that adds none; `Churn`,
    `Twist`; None takes the solver as it is.
    """

    _: KW_ONLY
    seed: int | Sequence[int] | None = None
    proposal: Asked = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None:
            check_seed(self.seed)
        check_proposal(self.proposal)

    def for_call(self: S, pipe: Any, groups: int, wanted: int) -> S:
        """Return this steerer with the seeds of the attached `Seeds`, where it has none of its own."""
        seeds = attached_seeds(pipe)
        if seeds is None:
            return self
        return self.seeded(picture_seeds(seeds.seeds, groups * wanted)[::wanted], groups)

    def seeded(self: S, seeds: int | Sequence[int], groups: int) -> S:
        """Return this steerer with these seeds, one for each prompt, unless it has its own."""
        if getattr(self, "seed", None) is not None:
            return self
        decided = copy.copy(self)
        object.__setattr__(decided, "seed", group_seeds(seeds, groups))
        return decided

    def build_proposal(
        self, asked: Churn | Twist | None, gradient: Callable[[Tensor], Tensor]
    ) -> Proposal | None:
        """Return the churn or the twist of this call."""
        if isinstance(asked, Churn):
            return ChurnedSteps(asked, lambda groups: prompt_seeds(self.seed, groups))
        if isinstance(asked, Twist):
            rising = getattr(self, "tilt", "rising") != "constant"
            return TwistedSteps(asked, gradient, strength=self.weight, rising=rising)
        return None


def prompt_seeds(seed: int | Sequence[int] | None, groups: int) -> list[int]:
    """Return one seed for each prompt: seed + g, or entry g. Raises ValueError for a wrong number of them."""
    if seed is None or isinstance(seed, int):
        return [(seed or 0) + g for g in range(groups)]
    if len(seed) != groups:
        raise ValueError(
            f"{len(seed)} selection seeds for {groups} prompts: give one number, or one for each prompt"
        )
    return list(seed)
