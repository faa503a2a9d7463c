"""Noise search: a better start noise, looked for in several rounds (arXiv 2501.09732), for every solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.checks import check_number, check_seed, check_whole
from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.steering.engine.outputs import best_first, joined, take
from diffplug.steering.engine.refusals import refuse_second_run
from diffplug.steering.engine.request import read_request
from diffplug.steering.engine.rule import Filter, Plan
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.slots import Slots
from diffplug.steering.parts import takes_old_keywords
from diffplug.steering.report import SteeringReport
from diffplug.steering.rules.best_of_n import BestOfN
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
    prompt g takes seed + g, or entry g of a sequence. In the report `calls` counts rounds. The rest: see
    `Steerer`; returns is "best" or "all". Raises ValueError for pipelines that take no latents, and for those
    whose run does not start from the latents given.
    """

    _: KW_ONLY
    rounds: int = 3
    search: str = "zero-order"
    radius: float = 0.4
    seed: int | Sequence[int] = 0

    copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return self._round().plan()

    def build_filter(self, groups: int) -> Filter:
        """Return a filter that never selects."""
        return self._round().build_filter(groups)

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

    def _round(self) -> BestOfN:
        return BestOfN(
            self.reward,
            particles=self.particles,
            returns="all",
            scoring=self.scoring,
            network=self.network,
        )

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        refuse_second_run(pipe)
        every = Slots(self.particles)
        request = read_request(pipe, kwargs, every)
        streams = [torch.Generator().manual_seed(s) for s in prompt_seeds(self.seed, request.groups)]
        total = request.groups * self.particles
        state: _Best | None = None
        reports = []
        for _ in range(self.rounds):
            given = dict(request.kwargs)
            if state is not None:
                given["latents"] = self._next(state, streams)
            run = SteeredRun(self._round(), pipe, replace(request, kwargs=given), every)
            start = _Start(total)
            undos = [intercept_step(pipe.scheduler, stand) for stand in (run.engine, start)]
            try:
                output = run(call)
            finally:
                for undo in undos:
                    undo()
            noise = start.noise(given.get("latents") if state is not None else None)
            found = _Best(output, noise, run.outcome.rewards.clone())
            state = found if state is None else state.improved(found)
            reports.append(run.report())
        if state is None:
            raise RuntimeError("no round was run")
        slots = [
            list(range(self.particles)) if self.returns == "all" else best_first(r)[: request.wanted]
            for r in state.rewards
        ]
        self._reports[:] = [_summary(reports, state.rewards, slots)]
        rows = [g * self.particles + slot for g, chosen in enumerate(slots) for slot in chosen]
        return take(state.output, rows, total)

    def _next(self, state: _Best, streams: list[torch.Generator]) -> Tensor:
        """Return the start noise of the next round, `[P * k, ...]`."""
        groups = state.noise.reshape(len(streams), self.particles, *state.noise.shape[1:])
        rounds = []
        for g, stream in enumerate(streams):
            fresh = torch.randn(groups[g].shape, generator=stream).to(groups)
            if self.search == "random" or not state.improving[g]:
                rounds.append(fresh)
                continue
            pivot = groups[g, int(state.rewards[g].argmax())]
            rounds.append((1 - self.radius**2) ** 0.5 * pivot + self.radius * fresh)
        return torch.cat(rounds)


class _Best:
    """The best picture of every slot so far: output and noise `[P * k, ...]`, rewards `[P, k]`."""

    def __init__(self, output: Any, noise: Tensor, rewards: Tensor) -> None:
        self.output, self.noise = output, noise
        self.rewards = torch.where(torch.isfinite(rewards), rewards, -torch.inf)
        self.improving = torch.isfinite(self.rewards).any(-1)

    def improved(self, other: _Best) -> _Best:
        """Return the better of both in every slot; the older one of equals."""
        better = (other.rewards > self.rewards).reshape(-1)
        total = len(better)
        rows = (torch.arange(total) + total * better).tolist()
        kept = _Best(
            take(joined(self.output, other.output, total), rows, 2 * total),
            torch.cat([self.noise, other.noise])[rows],
            torch.maximum(self.rewards, other.rewards),
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


def _summary(reports: list[SteeringReport], kept: Tensor, slots: list[list[int]]) -> SteeringReport:
    """Return one report of all rounds."""
    rounds, (groups, k) = len(reports), kept.shape
    sums = ("network_calls", "network_rows", "network_seconds", "decode_seconds", "reward_seconds")
    return replace(
        reports[-1],
        method="NoiseSearch",
        calls=tuple(range(rounds)),
        rewards=torch.stack([report.final_rewards for report in reports]),
        ess=torch.full((rounds, groups), float(k), dtype=torch.float64),
        resampled=torch.zeros(rounds, groups, dtype=torch.bool),
        ancestors=torch.arange(k).expand(rounds, groups, k),
        distinct_roots=torch.full((rounds, groups), k),
        final_rewards=kept,
        returned=tuple(tuple(chosen) for chosen in slots),
        invalid_rewards=sum(report.invalid_rewards for report in reports),
        total_seconds=sum(report.total_seconds for report in reports),
        **{name: sum(getattr(report, name) for report in reports) for name in sums},
    )
