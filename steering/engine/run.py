"""One steered call of a pipeline: run the particles, score the finished pictures, choose, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffplug.intercept import intercept_step
from diffplug.network.denoiser import NetworkCount, count_network, denoisers
from diffplug.pictures import raw_pictures, to_tensor
from diffplug.scheduler.guided_halves import HalvedSteps, steps_both_halves
from diffplug.seeds import SeededSteps
from diffplug.steering.engine.outputs import best_first, of_all, take
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.row_slices import sliced_network
from diffplug.steering.engine.rule import Filter, Plan, Rule
from diffplug.steering.engine.score_times import no_call
from diffplug.steering.engine.scoring import Scorer
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.step import DuplicateWatch, ParticleSteps
from diffplug.steering.parts import Network, Scoring
from diffplug.steering.report import SteeringReport
from diffplug.steering.smc.filter import checked_rewards
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.resampling import resample

_GUIDERS = ("guider", "ocr_guider")


class Steering(Rule, Protocol):
    """A rule with what one call needs beside it; see `Steerer` for the meaning."""

    needs_noise: ClassVar[bool]

    @property
    def reward(self) -> Any: ...
    @property
    def returns(self) -> str: ...
    @property
    def scoring(self) -> Scoring: ...
    @property
    def network(self) -> Network: ...
    @property
    def weight(self) -> float: ...
    @property
    def scores(self) -> bool: ...
    @property
    def leaders_first(self) -> bool: ...


@dataclass(frozen=True)
class Unscored:
    """A rule as it is where the reward is not needed: nothing is scored on the way."""

    rule: Rule

    @property
    def particles(self) -> int:
        """Return k."""
        return self.rule.particles

    def plan(self) -> Plan:
        """Return the plan that scores nothing."""
        return no_call

    def build_filter(self, groups: int) -> Filter:
        """Return the rule's own filter, which is never asked."""
        return self.rule.build_filter(groups)


@dataclass
class Outcome:
    """How a run ended: `[P, k]` rewards and log weights, `[P]` log normalisers, slots handed back."""

    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    invalid: int = 0
    returned: list[list[int]] = field(default_factory=list)


class SteeredRun:
    """State of one steered call: the engine at the scheduler, the clocks, and the outcome.

    noise: in words, what parts duplicates, for the report. Raises ValueError where the processes that share
    the particles make different calls.
    """

    noise: str = ""

    def __init__(self, steering: Steering, pipe: Any, request: Request, slots: Slots) -> None:
        self.steering, self.pipe, self.request, self.slots = steering, pipe, request, slots
        self.scorer = Scorer(
            steering.reward,
            steering.scoring,
            pipe,
            request,
            slots,
            weight=steering.weight,
            needed=steering.scores,
        )
        slots.agree(self._terms(), "calls")
        self.network = NetworkCount()
        self.engine = ParticleSteps(
            steering if steering.scores else Unscored(steering),
            self.scorer,
            watch=DuplicateWatch(strict=steering.needs_noise),
            slots=slots,
            guiders=[part for part in (getattr(pipe, name, None) for name in _GUIDERS) if part is not None],
        )

    def _terms(self) -> tuple[Any, ...]:
        """Return what all processes of a call must have in common."""
        request, steering = self.request, self.steering
        steps = request.kwargs.get("num_inference_steps")
        return type(steering).__name__, steering.weight, self.scorer.prompts, request.wanted, steps

    @torch.no_grad()
    def __call__(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output with the chosen pictures only."""
        start = perf_counter()
        slices = sliced_network(self.pipe, self.steering.network.batch_size)
        with slices, _counted(self.pipe) as self.network:
            output = self._called(call)
        self.network.rows = self.slots.total(self.network.rows)
        self.outcome = self._finish(raw_pictures(output))
        rows = self._choose()
        here = self.request.groups * len(self.slots.own)
        total = self.request.groups * self.slots.particles
        chosen = take(of_all(output, here, self.slots), rows, total)
        self.scorer.seconds.total += perf_counter() - start
        return chosen

    def _called(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output.

        Where every particle has a generator, steps that would draw from the global one get those of the call.
        """
        with ExitStack() as undo:
            if self.slots.every_seed and "generator" in self.request.kwargs:
                steps = SeededSteps()
                undo.callback(intercept_step(self.pipe.scheduler, steps))
                call = partial(_with_generators, steps, call)
            if steps_both_halves(self.pipe):
                halved = HalvedSteps(self.request.groups * len(self.slots.own))
                undo.callback(intercept_step(self.pipe.scheduler, halved))
            return call(**self.request.kwargs)

    def _finish(self, pictures: Any) -> Outcome:
        """Return rewards and weights of the finished pictures."""
        groups, k, here = self.request.groups, self.slots.particles, len(self.slots.own)
        if len(pictures) != groups * here:
            raise ValueError(
                f"{type(self.pipe).__name__} returned {len(pictures)} pictures for {groups} prompts "
                f"with {here} particles each: this pipeline cannot be steered"
            )
        if not self.steering.scores:
            unknown = torch.full((groups, k), torch.nan, dtype=torch.float64)
            return Outcome(unknown, torch.zeros(groups, k), torch.zeros(groups))
        rated = self.slots.made(lambda: self._rated(pictures))
        logw, log_z, final = self._filter().finish(rated)
        return Outcome(final, logw, log_z, checked_rewards(rated)[1])

    def _rated(self, pictures: Any) -> Tensor:
        """Return the rewards of the finished pictures that are here; NaN for those that are not finite."""
        latent = self.request.output_type == "latent"
        images = self.scorer.decoded(pictures) if latent else to_tensor(pictures)
        finite = torch.isfinite(images).flatten(1).all(1).cpu()
        rated = self.scorer.rate(images, "the end")
        return rated if bool(finite.all()) else torch.where(finite, rated, torch.nan)

    def _filter(self) -> Filter:
        found = self.engine.filter
        if found is None or found.groups != self.request.groups:
            raise ValueError(
                f"{type(self.pipe).__name__} did not denoise {self.request.groups} x "
                f"{self.slots.particles} rows with its "
                f"{type(self.pipe.scheduler).__name__}: this pipeline cannot be steered"
            )
        return found

    def _choose(self) -> list[int]:
        """Return the rows to hand back, prompt by prompt, and remember their slots."""
        groups, k = self.request.groups, self.slots.particles
        self.outcome.returned = [self._chosen(group) for group in range(groups)]
        self._tell_invalid()
        return [group * k + slot for group, slots in enumerate(self.outcome.returned) for slot in slots]

    def _chosen(self, group: int) -> list[int]:
        """Return the slots of a prompt that are handed back, in order."""
        final, wanted = self.outcome.rewards[group], self.request.wanted
        slots = list(range(self.slots.particles))
        if self.steering.scores and not bool(torch.isfinite(final).any()):
            warnings.warn(
                f"the reward was NaN or infinite for every finished picture of prompt {group}: they "
                "come in slot order",
                stacklevel=2,
            )
        elif self.steering.scores and self.steering.returns == "best":
            slots = best_first(final, self._apart())
        elif self.steering.scores and self.steering.returns == "sample":
            generators = self._filter().generators
            logw = self.outcome.log_weights[group]
            return resample(logw, generators[group % len(generators)], n=wanted).tolist()
        return slots if self.steering.returns == "all" else slots[:wanted]

    def _tell_invalid(self) -> None:
        """Warn where finished pictures have no reward while others have one."""
        invalid = self.outcome.invalid
        if 0 < invalid < self.outcome.rewards.numel():
            warnings.warn(
                f"{invalid} of {self.outcome.rewards.numel()} finished pictures have a reward of NaN or "
                "+inf, which counts as the worst: see report.invalid_rewards",
                stacklevel=2,
            )

    def _apart(self) -> int:
        """Return how many islands of a prompt never met and each send their best picture first."""
        found = self._filter()
        if not self.steering.leaders_first:
            return 1
        if isinstance(found, Islands) and found.ess_threshold is None:
            return found.count
        return 1

    def report(self) -> SteeringReport:
        """Return what this run did."""
        groups, k = self.request.groups, self.slots.particles
        selections = self.engine.filter.selections if self.engine.filter else []

        def stacked(name: str, *shape: int) -> Tensor:
            return (
                torch.stack([getattr(s, name) for s in selections]) if selections else torch.empty(0, *shape)
            )

        return SteeringReport(
            method=type(self.steering).__name__,
            particles=k,
            strength=self.steering.weight,
            prompts=tuple(self.scorer.prompts),
            steps=self.engine.steps,
            noise=self.noise,
            calls=tuple(selection.call for selection in selections),
            rewards=stacked("rewards", groups, k),
            ess=stacked("ess", groups),
            resampled=stacked("resampled", groups),
            ancestors=stacked("ancestors", groups, k),
            distinct_roots=stacked("distinct_roots", groups),
            log_z=self.outcome.log_z,
            final_rewards=self.outcome.rewards,
            final_log_weights=self.outcome.log_weights,
            returned=tuple(tuple(slots) for slots in self.outcome.returned),
            invalid_rewards=self.outcome.invalid + sum(selection.invalid for selection in selections),
            network_calls=self.network.calls,
            network_rows=self.network.rows,
            network_seconds=self.network.seconds,
            decode_seconds=self.scorer.seconds.decode,
            reward_seconds=self.scorer.seconds.reward,
            total_seconds=self.scorer.seconds.total,
        )


def _with_generators(steps: SeededSteps, call: Callable[..., Any], **kwargs: Any) -> Any:
    return steps.run(call, kwargs)


@contextmanager
def _counted(pipe: Any) -> Iterator[NetworkCount]:
    """Yield a count of the denoiser's calls; an empty one where no denoiser is known."""
    try:
        denoisers(pipe)
    except ValueError:
        yield NetworkCount()
        return
    with count_network(pipe) as count:
        yield count
