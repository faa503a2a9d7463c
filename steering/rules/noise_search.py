"""Noise search: a better start noise, looked for in several rounds (arXiv 2501.09732), for every solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.checks import check_number, check_seed, check_whole
from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.rewards import Reward
from diffplug.seeds import attached_seeds
from diffplug.steering.engine.early_end import Until
from diffplug.steering.engine.generators import particle_generators
from diffplug.steering.engine.outputs import best_first, take
from diffplug.steering.engine.refusals import refuse_second_run
from diffplug.steering.engine.request import Request, read_request
from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.some_prompts import gathered, of_prompts
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.report import SUMS, SteeringReport
from diffplug.steering.rules.best_of_n import BestOfN, checked_judge
from diffplug.steering.steerer import Steerer, prompt_seeds

SEARCHES = ("zero-order", "random")


@takes_old_keywords
@dataclass(frozen=True)
class NoiseSearch(Steerer):
    """The best picture over several rounds of `particles` start noises per prompt; costs rounds * k pictures.

    The first round is the pipeline's own. search: "zero-order" draws the next round around the noise of the
    best picture so far, sqrt(1 - radius^2) z + radius e (which is standard normal again), and afresh for a
    prompt that the last round did not improve; "random" always draws afresh, which is best of rounds * k in
    portions. Every slot keeps its best picture. radius: in (0, 1]. seed: of the rounds after the first;
    prompt g takes seed + g, or entry g of a sequence. enough, seconds: as in `BestOfN`, looked at after every
    round; prompts that are done are left out of the next. judge: a held-out reward, as there. In the report
    `calls` counts rounds, and rewards of prompts that were done are NaN. The rest: see `Steerer`; returns is
    "best" or "all". Raises ValueError for pipelines that take no latents, and for those whose run does not
    start from the latents given.
    """

    _: KW_ONLY
    rounds: int = 3
    search: str = "zero-order"
    radius: float = 0.4
    seed: int | Sequence[int] = 0
    enough: float | None = None
    seconds: float | None = None
    judge: Reward | str | None = None

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "judge", checked_judge(self.judge))
        Until(self.enough, self.seconds).check_within(self.reward)
        check_whole("rounds", self.rounds)
        check_number("radius", self.radius)
        check_seed(self.seed)
        if self.search not in SEARCHES:
            raise ValueError(f"unknown search {self.search!r}: choose one of {', '.join(SEARCHES)}")
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius={self.radius}: it must be in (0, 1]")
        if self.network.ranks:
            raise ValueError("NoiseSearch runs in one process: give each its own prompts, or take BestOfN")
        if self.returns == "sample":
            raise ValueError("NoiseSearch has no weights to draw by: choose returns='best' or 'all'")

    @property
    def weight(self) -> float:
        """Return 0: no tilt."""
        return 0.0

    def plan(self) -> Plan:
        """Return the plan that scores nothing before the end of a round."""
        return self.round_rule().plan()

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that never selects."""
        return self.round_rule().build_filter(groups)

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Return a function that detaches this search. Raises ValueError for pipelines without latents."""
        parameters = inspect.signature(type(pipe).__call__).parameters
        if "latents" not in parameters or "strength" in parameters:
            raise ValueError(
                f"{type(pipe).__name__} does not start from given latents: use BestOfN, which needs none"
            )
        return super().attach(pipe)

    def no_crowd(self) -> str:
        """Return why a loop cannot be searched: it runs once."""
        return "it runs a pipeline several times; make a BestOfN crowd for every round"

    def round_rule(self) -> BestOfN:
        """Return the rule of one round."""
        return BestOfN(
            self.reward,
            particles=self.particles,
            returns="all",
            scoring=self.scoring,
            network=self.network,
            judge=self.judge,
        )

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        refuse_second_run(pipe)
        search = _Search(self, pipe, read_request(pipe, kwargs, Slots(self.particles)))
        output = search(call)
        self._reports[:] = [search.report()]
        return output

    def next_noise(
        self, noise: Tensor, rewards: Tensor, improving: Tensor, streams: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the start noise of another round, `[P, k, ...]`, from the best noise and rewards so far."""
        rounds = []
        for g, stream in enumerate(streams):
            fresh = torch.randn(noise[g].shape, generator=stream).to(noise)
            if self.search == "random" or not improving[g]:
                rounds.append(fresh)
                continue
            pivot = noise[g, int(rewards[g].argmax())]
            rounds.append((1 - self.radius**2) ** 0.5 * pivot + self.radius * fresh)
        return torch.stack(rounds)


class _Search:
    """One searched call: its rounds, each of the prompts that are not done, and the best of every slot."""

    def __init__(self, rule: NoiseSearch, pipe: Any, request: Request) -> None:
        self.rule, self.pipe, self.request = rule, pipe, request
        self.groups, self.k = request.groups, rule.particles
        self.streams = [torch.Generator().manual_seed(s) for s in prompt_seeds(rule.seed, self.groups)]
        self.left = list(range(self.groups))
        self.state: _Best | None = None
        self.judged = torch.full((self.groups, self.k), torch.nan, dtype=torch.float64)
        self.reports: list[SteeringReport] = []
        self.rounds: list[Tensor] = []
        self.drawn = [0] * self.groups

    def __call__(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output with the chosen pictures."""
        start, until = perf_counter(), Until(self.rule.enough, self.rule.seconds)
        for _ in range(self.rule.rounds):
            state = self._round(call)
            self.left = [g for g in self.left if not until.reached(state.rewards[g], self.request.wanted)]
            if not self.left or until.late(start):
                break
        self.slots = [
            list(range(self.k)) if self.rule.returns == "all" else best_first(r)[: self.request.wanted]
            for r in state.rewards
        ]
        rows = [g * self.k + slot for g, chosen in enumerate(self.slots) for slot in chosen]
        return take(state.output, rows, self.groups * self.k)

    def _round(self, call: Callable[..., Any]) -> _Best:
        """Run a round of the prompts that are left, and return the best of all rounds."""
        left, state = self.left, self.state
        given = self._arguments(left)
        if state is not None:
            noise = state.noise.reshape(self.groups, self.k, *state.noise.shape[1:])[left]
            streams = [self.streams[g] for g in left]
            made = self.rule.next_noise(noise, state.rewards[left], state.improving[left], streams)
            given["latents"] = made.flatten(0, 1)
        rule = self.rule.round_rule().portion(self.k, left)
        run = SteeredRun(rule, self.pipe, self._request(given), Slots(self.k))
        start = _Start(len(left) * self.k)
        undos = [intercept_step(self.pipe.scheduler, stand) for stand in (run.engine, start)]
        try:
            output = run(call)
        finally:
            for undo in undos:
                undo()
        noise = start.noise(given.get("latents") if state is not None else None)
        found = _Best(output, noise, run.outcome.rewards.clone())
        self._note(run)
        if run.judged is not None:  # of the pictures that slots keep
            fresh = run.judged.reshape(len(left), self.k)
            better = state is None or found.rewards > state.rewards[left]
            self.judged[left] = torch.where(torch.as_tensor(better), fresh, self.judged[left])
        self.state = found if state is None else state.improved(found, left)
        return self.state

    def _arguments(self, left: Sequence[int]) -> dict[str, Any]:
        """Return the call's arguments for some prompts; attached seeds stay with their pictures."""
        given = of_prompts(self.request.kwargs, left, self.groups, self.k)
        if len(left) < self.groups and given.get("generator") is None and attached_seeds(self.pipe):
            every = particle_generators(self.pipe, None, self.groups, self.request.wanted, Slots(self.k))
            given["generator"] = [every[g * self.k + slot] for g in left for slot in range(self.k)]
        return given

    def _request(self, given: dict[str, Any]) -> Request:
        """Return the request of a round."""
        prompts = self.request.prompts
        some = None if prompts is None else tuple(prompts[g] for g in self.left)
        return replace(self.request, kwargs=given, groups=len(self.left), prompts=some)

    def _note(self, run: SteeredRun) -> None:
        seen = torch.full((self.groups, self.k), torch.nan, dtype=torch.float64)
        seen[self.left] = run.outcome.rewards
        self.rounds.append(seen)
        self.reports.append(run.report())
        for g in self.left:
            self.drawn[g] += self.k

    def report(self) -> SteeringReport:
        """Return one report of all rounds."""
        state, rounds = self.state, len(self.rounds)
        if state is None:
            raise RuntimeError("no round was run")
        groups, k = self.groups, self.k
        early = self.rule.enough is not None or self.rule.seconds is not None
        texts = self.reports[0].prompts
        return replace(
            self.reports[-1],
            method="NoiseSearch",
            prompts=texts,
            calls=tuple(range(rounds)),
            rewards=torch.stack(self.rounds),
            ess=torch.full((rounds, groups), float(k), dtype=torch.float64),
            resampled=torch.zeros(rounds, groups, dtype=torch.bool),
            ancestors=torch.arange(k).expand(rounds, groups, k),
            distinct_roots=torch.full((rounds, groups), k),
            log_z=self.reports[0].log_z,
            final_rewards=state.rewards,
            final_log_weights=self.reports[0].final_log_weights,
            judge_rewards=None if self.reports[0].judge_rewards is None else self.judged,
            draws=tuple(self.drawn) if early else (),
            returned=tuple(tuple(chosen) for chosen in self.slots),
            invalid_rewards=sum(report.invalid_rewards for report in self.reports),
            total_seconds=sum(report.total_seconds for report in self.reports),
            **{name: sum(getattr(report, name) for report in self.reports) for name in SUMS},
        )


class _Best:
    """The best picture of every slot so far: output and noise `[P * k, ...]`, rewards `[P, k]`."""

    def __init__(self, output: Any, noise: Tensor, rewards: Tensor) -> None:
        self.output, self.noise = output, noise
        self.rewards = torch.where(torch.isfinite(rewards), rewards, -torch.inf)
        self.improving = torch.isfinite(self.rewards).any(-1)

    def improved(self, other: _Best, groups: Sequence[int] | None = None) -> _Best:
        """Return the better of both in every slot of some prompts, by default all; the older one of equals.

        other: of those prompts alone.
        """
        count, k = self.rewards.shape
        groups = range(count) if groups is None else groups
        better = torch.zeros(len(self.noise), dtype=torch.long) - 1  # row of `other`, or none
        rows = torch.tensor([g * k + slot for g in groups for slot in range(k)])
        ahead = (other.rewards > self.rewards[list(groups)]).reshape(-1)
        better[rows[ahead]] = torch.arange(len(rows))[ahead]
        total = len(better)
        picks = [(0, row) if of < 0 else (1, of) for row, of in enumerate(better.tolist())]
        joined = torch.cat([self.noise, other.noise])
        rewards = self.rewards.clone()
        rewards[list(groups)] = torch.maximum(rewards[list(groups)], other.rewards)
        kept = _Best(
            gathered([(self.output, total), (other.output, len(rows))], picks),
            joined[[row if of == 0 else total + row for of, row in picks]],
            rewards,
        )
        kept.improving = kept.rewards.amax(-1) > self.rewards.amax(-1)
        return kept


class _Start(StepInterceptor):
    """Remembers the sample of the first step: the start noise, times what the scheduler makes of it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sample: Tensor | None = None
        self.sigma = 1.0

    def on_step(self, call: StepCall) -> Any:
        """Return the step's own result."""
        if self.sample is None:
            self.sample = call.sample.detach().clone()
            self.sigma = float(getattr(call.scheduler, "init_noise_sigma", 1.0))
        return call.run()

    def noise(self, given: Tensor | None) -> Tensor:
        """Return the start noise. Raises ValueError where it is not the one that was given."""
        if self.sample is None or len(self.sample) != self.rows:
            raise ValueError("the pipeline made no step with a row for every particle: use BestOfN")
        if not self.sample.is_floating_point():
            raise ValueError("the pipeline starts from masked tokens, which are all the same: use BestOfN")
        noise = self.sample / self.sigma
        if given is not None and not torch.allclose(noise, given.to(noise), rtol=1e-2, atol=1e-2):
            raise ValueError("the pipeline does not start from the latents that it is given: use BestOfN")
        return noise
