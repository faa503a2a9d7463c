"""One steered call of a pipeline: run the particles, score the finished pictures, choose, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffplug.denoiser import NetworkCount, count_network, denoisers
from diffplug.intercept import intercept_step
from diffplug.pictures import raw_pictures, to_tensor
from diffplug.seeds import SeededSteps
from diffplug.steering.engine.duplicates import CopyWatch
from diffplug.steering.engine.outputs import best_first, of_all, take
from diffplug.steering.engine.ranks import ALONE, Ranks, Slots
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.row_slices import sliced_network
from diffplug.steering.engine.score_times import no_call
from diffplug.steering.engine.scoring import Scorer
from diffplug.steering.engine.step import Filter, ParticleSteps
from diffplug.steering.report import SteeringReport
from diffplug.steering.smc.filter import checked_rewards
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.resampling import resample

if TYPE_CHECKING:
    from diffplug.steering.steerer import Steerer

_GUIDERS = ("guider", "ocr_guider")


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

    ranks: the processes that share the particles; each then needs the generators of its rows in the request.
    """

    def __init__(self, steerer: Steerer, pipe: Any, request: Request, ranks: Ranks | None = None) -> None:
        self.steerer = steerer
        self.pipe = pipe
        self.request = request
        self.seeded = ranks is not None and "generator" in request.kwargs
        self.slots = Slots(steerer.particles, ranks or ALONE)
        self.scorer = Scorer(steerer, pipe, request, self.slots)
        self.slots.ranks.agree(self._terms(), "calls")
        self.network = NetworkCount()
        self.engine = ParticleSteps(
            steerer.build_filter,
            self._score,
            particles=steerer.particles,
            calls=steerer.plan() if steerer.scores else no_call,
            watch=CopyWatch(strict=steerer.needs_noise),
            proposal=steerer.build_proposal(self.scorer.gradient),
            ranks=self.slots.ranks,
            guiders=[part for part in (getattr(pipe, name, None) for name in _GUIDERS) if part is not None],
        )

    def _terms(self) -> tuple[Any, ...]:
        """Return what all processes of a call must have in common."""
        request, steerer = self.request, self.steerer
        steps = request.kwargs.get("num_inference_steps")
        return type(steerer).__name__, steerer.weight, self.scorer.prompts, request.wanted, steps

    @torch.no_grad()
    def __call__(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output with the chosen pictures only."""
        with self.scorer.seconds.add("total"):
            slices = sliced_network(self.pipe, self.steerer.network_batch_size)
            with slices, _counted(self.pipe) as self.network:
                output = self._seeded(call) if self.seeded else call(**self.request.kwargs)
            self.network.rows = sum(self.slots.ranks.everyone(lambda: self.network.rows))
            self.outcome = self._finish(raw_pictures(output))
            rows = self._choose()
            here = self.request.groups * len(self.slots.own)
            total = self.request.groups * self.steerer.particles
            return take(of_all(output, here, self.slots), rows, total)

    def _seeded(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output; steps that would draw from the global generator get those of the
        call.
        """
        steps = SeededSteps()
        undo = intercept_step(self.pipe.scheduler, steps)
        try:
            return steps.run(call, self.request.kwargs)
        finally:
            undo()

    def _score(self, x0: Tensor, index: int) -> Tensor:
        """Return the values `[P * k]` of all states of a call."""
        return self.slots.made(lambda: self.scorer.value(x0, index, self.engine.steps, self.engine.now))

    def _finish(self, pictures: Any) -> Outcome:
        """Return rewards and weights of the finished pictures."""
        shape = (self.request.groups, self.steerer.particles)
        here = len(self.slots.own)
        if len(pictures) != shape[0] * here:
            raise ValueError(
                f"{type(self.pipe).__name__} returned {len(pictures)} pictures for {shape[0]} prompts "
                f"with {here} particles each: this pipeline cannot be steered"
            )
        if not self.steerer.scores:
            return Outcome(
                torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape), torch.zeros(shape[0])
            )
        rated = self.slots.made(lambda: self._rated(pictures))
        logw, log_z, final = self._filter().finish(rated)
        return Outcome(final, logw, log_z, checked_rewards(rated)[1])

    def _rated(self, pictures: Any) -> Tensor:
        latent = self.request.output_type == "latent"
        return self.scorer.rate(self.scorer.decoded(pictures) if latent else to_tensor(pictures), "the end")

    def _filter(self) -> Filter:
        found = self.engine.filter
        if found is None or found.groups != self.request.groups:
            raise ValueError(
                f"{type(self.pipe).__name__} did not denoise {self.request.groups} x "
                f"{self.steerer.particles} rows with its "
                f"{type(self.pipe.scheduler).__name__}: this pipeline cannot be steered"
            )
        return found

    def _choose(self) -> list[int]:
        """Return the rows to hand back, prompt by prompt, and remember their slots."""
        self.outcome.returned = [self._slots(group) for group in range(self.request.groups)]
        k = self.steerer.particles
        return [group * k + slot for group, slots in enumerate(self.outcome.returned) for slot in slots]

    def _slots(self, group: int) -> list[int]:
        final, logw, wanted = (
            self.outcome.rewards[group],
            self.outcome.log_weights[group],
            self.request.wanted,
        )
        slots = list(range(self.steerer.particles))
        if self.steerer.scores and not bool(torch.isfinite(final).any()):
            warnings.warn(
                f"the reward was NaN or infinite for every finished picture of prompt {group}: they "
                "come in slot order",
                stacklevel=2,
            )
        elif self.steerer.scores and self.steerer.returns == "best":
            slots = best_first(final, self._apart())
        elif self.steerer.scores and self.steerer.returns == "sample":
            generators = self._filter().generators
            return resample(logw, generators[group % len(generators)], n=wanted).tolist()
        return slots if self.steerer.returns == "all" else slots[:wanted]

    def _apart(self) -> int:
        """Return how many populations of a prompt never met and each send their best picture first."""
        found = self._filter()
        if not self.steerer.leaders_first:
            return 1
        if isinstance(found, Islands) and found.ess_threshold is None:
            return found.count
        return 1

    def report(self) -> SteeringReport:
        """Return what this run did."""
        groups, k = self.request.groups, self.steerer.particles
        selections = self.engine.filter.selections if self.engine.filter else []

        def stacked(name: str, *shape: int) -> Tensor:
            return (
                torch.stack([getattr(s, name) for s in selections]) if selections else torch.empty(0, *shape)
            )

        return SteeringReport(
            method=type(self.steerer).__name__,
            particles=k,
            strength=self.steerer.weight,
            prompts=tuple(self.scorer.prompts),
            steps=self.engine.steps,
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
