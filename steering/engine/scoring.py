"""Scoring: from latents or finished pictures to rewards, with clocks, and errors that name the particle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffplug import latents, rewards
from diffplug.intercept import StepCall
from diffplug.pictures import score_pictures
from diffplug.steering.engine import denoised as clean
from diffplug.steering.engine.denoised import level_of
from diffplug.steering.engine.ranks import Slots
from diffplug.steering.engine.request import Request
from diffplug.steering.proposals import reward_gradient
from diffplug.steering.values.many_samples import State, Value

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


class Scorer:
    """Rates the rows of one steered call that are in this process; `texts` holds the prompt of each."""

    def __init__(self, steerer: Steerer, pipe: Any, request: Request, slots: Slots) -> None:
        self.steerer, self.pipe, self.request, self.slots = steerer, pipe, request, slots
        self.prompts = _reward_prompts(steerer, request)
        self.texts = [prompt for prompt in self.prompts for _ in slots.own]
        self.seconds = Seconds()

    def value(self, x0: Tensor, index: int, steps: int, call: StepCall | None) -> Tensor:
        """Return the values `[n]` of the states of a call, by default rewards of clean predictions."""
        where = f"step {index + 1} of {steps}"

        def rated(x: Tensor) -> Tensor:
            return self.rate(self.decoded(x, self._early_decoder()), where)

        value = self.steerer.value
        return rated(x0) if value is None else self._valued(value, self._state(x0, index, call, rated), where)

    def _state(
        self, x0: Tensor, index: int, call: StepCall | None, rate: Callable[[Tensor], Tensor]
    ) -> State:
        if call is None:
            raise RuntimeError("a state is valued outside of a scheduler call")
        return State(
            sample=call.sample,
            output=call.model_output,
            x0=x0,
            level=level_of(call),
            prompts=self.texts,
            call=index,
            strength=self.steerer.weight,
            rate=rate,
        )

    def _valued(self, value: Value, state: State, where: str) -> Tensor:
        """Return a value's numbers. ValueError names the call where they are not one for each row."""
        try:
            found = torch.as_tensor(value(state)).detach().to("cpu", torch.float64)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the value failed at {where}: {type(error).__name__}: {reason}") from error
        if found.shape != (len(state.x0),):
            raise ValueError(
                f"the value failed at {where}: it returned shape {tuple(found.shape)} for "
                f"{len(state.x0)} particles, it must be ({len(state.x0)},)"
            )
        return found

    def gradient(self, x0: Tensor) -> Tensor:
        """Return the gradient of the reward with respect to clean latents, shaped like them."""
        reward: Any = self.steerer.reward

        def rate(part: Tensor, rows: slice) -> Tensor:
            images = self.decoded(part, self._early_decoder())
            try:
                return reward(images, self.texts[rows])
            except Exception as error:
                prompt, place = divmod(rows.start, len(self.slots.own))
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise ValueError(
                    f"the reward failed while its gradient was taken, from particle {self.slots.own[place]} "
                    f"of prompt {prompt} on: {reason}"
                ) from error

        return reward_gradient(rate, x0, self.steerer.decode_batch_size)

    def _early_decoder(self) -> Callable[..., Tensor] | None:
        """Return how clean predictions are decoded before the end; None is the pipeline's own way."""
        preview = self.steerer.preview
        return self.steerer.decode if preview is None else partial(latents.decode, vae=preview)

    def decoded(self, x: Tensor, decode: Callable[..., Tensor] | None = None) -> Tensor:
        """Return pictures of latents or tokens, by another decoder where one is given."""
        with self.seconds.add("decode"):
            images = (decode or clean.decode)(
                self.pipe, x, **self.request.size, batch_size=self.steerer.decode_batch_size
            )
        if getattr(images, "shape", (0,))[0] != len(x):
            raise ValueError(
                f"the decoder must return a tensor of {len(x)} pictures for as many latents, it returned "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}"
            )
        return images

    def rate(self, images: Tensor, where: str) -> Tensor:
        """Return the rewards of all rows. ValueError names the call and, if known, the particle."""
        texts = self.texts
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
                prompt, place = divmod(row, len(self.slots.own))
                return f"particle {self.slots.own[place]} of prompt {prompt}"
        return f"particles {self.slots.own[0]} to {self.slots.own[-1]} scored together"


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
