"""One steered call of a pipeline: run the particles, score the finished pictures, choose, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from diffplug.intercept import intercept_step
from diffplug.network.denoiser import NetworkCount, count_network, denoisers
from diffplug.pictures import raw_pictures, to_tensor
from diffplug.scheduler.guided_halves import HalvedSteps, steps_both_halves
from diffplug.seeds import SeededSteps
from diffplug.steering.engine.outputs import of_all, take
from diffplug.steering.engine.population import Choosing, Ending, Unscored
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.row_slices import sliced_network
from diffplug.steering.engine.rule import Filter
from diffplug.steering.engine.scoring import Scorer
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.step import ParticleSteps
from diffplug.steering.engine.twins import DuplicateWatch
from diffplug.steering.report import SteeringReport, told

if TYPE_CHECKING:
    from diffplug.steering.parts import Network, Scoring

_GUIDERS = ("guider", "ocr_guider")


class Steering(Choosing, Protocol):
    """A rule with what one call needs beside it; see `Steerer` for the meaning."""

    @property
    def reward(self) -> Any: ...
    @property
    def returns(self) -> str: ...
    @property
    def scoring(self) -> Scoring: ...
    @property
    def network(self) -> Network: ...


class SteeredRun:
    """State of one steered call: the engine at the scheduler, the clocks, and the outcome.

    noise: in words, what parts duplicates, for the report. judged: what a held-out reward says of the
    finished pictures, `[P * k]`, where the rule has one. Raises ValueError where the processes that share
    the particles make different calls.
    """

    noise: str = ""
    judged: Tensor | None

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
        self.judge, self.judged = self._judge(), None
        slots.agree(self._terms(), "calls")
        self.network = NetworkCount()
        self.engine = ParticleSteps(
            steering if steering.scores else Unscored(steering),
            self.scorer,
            watch=DuplicateWatch(strict=steering.needs_noise),
            slots=slots,
            guiders=[part for part in (getattr(pipe, name, None) for name in _GUIDERS) if part is not None],
        )

    def _judge(self) -> Scorer | None:
        """Return what asks the held-out reward, None where there is none."""
        judge = getattr(self.steering, "judge", None)
        if judge is None:
            return None
        return Scorer(judge, self.steering.scoring, self.pipe, self.request, self.slots)

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
            undo.enter_context(self.scorer.known.noted())
            if self.slots.every_seed and "generator" in self.request.kwargs:
                steps = SeededSteps()
                undo.callback(intercept_step(self.pipe.scheduler, steps))
                call = partial(_with_generators, steps, call)
            if steps_both_halves(self.pipe):
                halved = HalvedSteps(self.request.groups * len(self.slots.own))
                undo.callback(intercept_step(self.pipe.scheduler, halved))
            return call(**self.request.kwargs)

    def _finish(self, pictures: Any) -> Ending:
        """Return rewards and weights of the finished pictures."""
        groups, k, here = self.request.groups, self.slots.particles, len(self.slots.own)
        if len(pictures) != groups * here:
            raise ValueError(
                f"{type(self.pipe).__name__} returned {len(pictures)} pictures for {groups} prompts "
                f"with {here} particles each: this pipeline cannot be steered"
            )
        if not self.steering.scores:
            return Ending.unscored(groups, k)
        latent = self.request.output_type == "latent"
        images = self.scorer.decoded(pictures) if latent else to_tensor(pictures)
        ending = Ending.judged(self._filter(), self.slots.made(lambda: self._rated(self.scorer, images)))
        if self.judge is not None:
            judge = self.judge
            self.judged = self.slots.made(lambda: self._rated(judge, images))
        return ending

    def _rated(self, scorer: Scorer, images: Tensor) -> Tensor:
        """Return the rewards of the finished pictures that are here; NaN for those that are not finite."""
        finite = torch.isfinite(images).flatten(1).all(1).cpu()
        where = "the end" if scorer is self.scorer else "the end, as the judge"
        rated = scorer.rate(images, where)
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
        self.returned = [self._chosen(group) for group in range(groups)]
        self._tell_invalid()
        return [group * k + slot for group, slots in enumerate(self.returned) for slot in slots]

    def _chosen(self, group: int) -> list[int]:
        """Return the slots of a prompt that are handed back, in order."""
        steering, every = self.steering, list(range(self.slots.particles))
        if self.outcome.nothing_valid(steering, group):
            warnings.warn(
                f"the reward was NaN or infinite for every finished picture of prompt {group}: they "
                "come in slot order",
                stacklevel=2,
            )
        elif steering.scores and steering.returns == "sample":
            return self.outcome.sample(self._filter(), group, self.request.wanted)
        elif steering.scores and steering.returns == "best":
            every = self.outcome.best(steering, self._filter(), group)
        return every if steering.returns == "all" else every[: self.request.wanted]

    def _tell_invalid(self) -> None:
        """Warn where finished pictures have no reward while others have one."""
        invalid = self.outcome.invalid
        if 0 < invalid < self.outcome.rewards.numel():
            warnings.warn(
                f"{invalid} of {self.outcome.rewards.numel()} finished pictures have a reward of NaN or "
                "+inf, which counts as the worst: see report.invalid_rewards",
                stacklevel=2,
            )

    def report(self) -> SteeringReport:
        """Return what this run did."""
        return SteeringReport(
            method=type(self.steering).__name__,
            strength=self.steering.weight,
            prompts=tuple(self.scorer.prompts),
            steps=self.engine.steps,
            noise=self.noise,
            returned=tuple(tuple(slots) for slots in self.returned),
            judge_rewards=None if self.judged is None else self.judged.reshape(self.outcome.rewards.shape),
            network_calls=self.network.calls,
            network_rows=self.network.rows,
            network_seconds=self.network.seconds,
            decode_seconds=self.scorer.seconds.decode,
            reward_seconds=self.scorer.seconds.reward,
            total_seconds=self.scorer.seconds.total,
            **told(self.engine.filter, self.outcome),
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
