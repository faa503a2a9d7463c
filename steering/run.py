"""One steered call of a pipeline: run the particles, score the finished pictures, choose, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffplug import latents, rewards
from diffplug.report import NetworkCount, count_network, denoisers
from diffplug.steering.copies import CopyWatch
from diffplug.steering.particle_filter import checked_rewards
from diffplug.steering.particles import Filter, ParticleSteps
from diffplug.steering.pictures import best_first, raw_pictures, score_pictures, take, to_tensor
from diffplug.steering.populations import Populations
from diffplug.steering.report import SteeringReport
from diffplug.steering.request import Request
from diffplug.steering.resampling import resample

if TYPE_CHECKING:
    from diffplug.steering.steerer import Steerer


@dataclass
class Seconds:
    """Host seconds of the parts of a run."""

    decode: float = 0.0
    reward: float = 0.0
    total: float = 0.0

    @contextmanager
    def add(self, part: str) -> Iterator[None]:
        """Add the seconds that the block takes to a part."""
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + perf_counter() - start)


@dataclass
class Outcome:
    """How a run ended: `[P, k]` rewards and log weights, `[P]` log normalisers, slots handed back."""

    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    invalid: int = 0
    returned: list[list[int]] = field(default_factory=list)


class SteeredRun:
    """State of one steered call: the engine at the scheduler, the clocks, and the outcome."""

    def __init__(self, steerer: Steerer, pipe: Any, request: Request) -> None:
        self.steerer = steerer
        self.pipe = pipe
        self.request = request
        self.prompts = _reward_prompts(steerer, request)
        self.seconds = Seconds()
        self.network = NetworkCount()
        self.engine = ParticleSteps(
            steerer.build_filter,
            self.score_x0,
            particles=steerer.particles,
            calls=steerer.plan(),
            watch=CopyWatch(strict=steerer.needs_noise),
        )

    @torch.no_grad()
    def __call__(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output with the chosen pictures only."""
        with self.seconds.add("total"):
            with _counted(self.pipe) as self.network:
                output = call(**self.request.kwargs)
            self.outcome = self._finish(raw_pictures(output))
            rows = self._choose()
            return take(output, rows, self.request.groups * self.steerer.particles)

    def score_x0(self, x0: Tensor, call: int) -> Tensor:
        """Return the rewards `[P * k]` of clean predictions at a call."""
        return self._rate(self._decoded(x0, self.steerer.decode), f"step {call + 1} of {self.engine.steps}")

    def _decoded(self, x: Tensor, decode: Callable[..., Tensor] | None = None) -> Tensor:
        size = {name: self.request.kwargs.get(name) for name in ("height", "width", "num_frames")}
        with self.seconds.add("decode"):
            return (decode or latents.decode)(self.pipe, x, **size, batch_size=self.steerer.decode_batch_size)

    def _rate(self, images: Tensor, where: str) -> Tensor:
        """Return the rewards of all rows. ValueError names the call and, if known, the particle."""
        texts = [prompt for prompt in self.prompts for _ in range(self.steerer.particles)]
        try:
            with self.seconds.add("reward"):
                return self._scored(images, texts)
        except Exception as error:
            message = str(error).partition("\n")[0]
            raise ValueError(
                f"the reward failed at {where}, {self._culprit(images, texts)}: {type(error).__name__}: "
                f"{message}"
            ) from error

    def _scored(self, images: Tensor, texts: list[str]) -> Tensor:
        reward: Any = self.steerer.reward
        takes_video = bool(getattr(reward, "takes_video", False))
        return score_pictures(
            lambda pictures, words: rewards.score(reward, pictures, words),
            images,
            texts,
            takes_video=takes_video,
        )

    def _culprit(self, images: Tensor, texts: list[str]) -> str:
        """Return which particle makes the reward raise, found by scoring them one by one."""
        for row, text in enumerate(texts):
            try:
                self._scored(images[row : row + 1], [text])
            except Exception:
                prompt, slot = divmod(row, self.steerer.particles)
                return f"particle {slot} of prompt {prompt}"
        return f"particles 0 to {self.steerer.particles - 1} scored together"

    def _finish(self, pictures: Any) -> Outcome:
        """Return rewards and weights of the finished pictures."""
        shape = (self.request.groups, self.steerer.particles)
        if len(pictures) != shape[0] * shape[1]:
            raise ValueError(
                f"{type(self.pipe).__name__} returned {len(pictures)} pictures for {shape[0]} prompts "
                f"with {shape[1]} particles each: "
                "this pipeline cannot be steered"
            )
        if not self.steerer.scores:
            return Outcome(
                torch.full(shape, torch.nan, dtype=torch.float64), torch.zeros(shape), torch.zeros(shape[0])
            )
        images = self._decoded(pictures) if self.request.output_type == "latent" else to_tensor(pictures)
        rated = self._rate(images, "the end")
        logw, log_z, final = self._filter().finish(rated)
        return Outcome(final, logw, log_z, checked_rewards(rated)[1])

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
        """Return how many populations of a prompt never met."""
        found = self._filter()
        apart = isinstance(found, Populations) and found.ess_threshold is None
        return found.count if apart else 1

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
            prompts=tuple(self.prompts),
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
            decode_seconds=self.seconds.decode,
            reward_seconds=self.seconds.reward,
            total_seconds=self.seconds.total,
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


def _reward_prompts(steerer: Steerer, request: Request) -> list[str]:
    """Return the texts that the reward gets, one per prompt of the call."""
    texts = [steerer.prompts] if isinstance(steerer.prompts, str) else steerer.prompts
    if texts is None and request.prompts is None and steerer.scores:
        raise ValueError(
            "the call gives prompt_embeds, so the reward would get no text: pass prompts=[...] to the "
            "steerer, one for each prompt"
        )
    texts = texts if texts is not None else request.prompts
    chosen = list(texts if texts is not None else ("",) * request.groups)
    if len(chosen) != request.groups:
        raise ValueError(
            f"the steerer has {len(chosen)} prompts, the call has {request.groups}: give one for each"
        )
    return chosen
