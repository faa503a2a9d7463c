"""Scoring: from latents or finished pictures of a pipeline to rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.latents import PictureDecoder
from diffplug.pictures import score_pictures
from diffplug.steering.engine.rating import Rater
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.rule import ScoredStep, State, Value
from diffplug.steering.engine.slots import Slots
from diffplug.steering.proposals import reward_gradient
from diffplug.video.known_frames import KnownFrames

if TYPE_CHECKING:
    from diffplug.steering.parts import Scoring


class Scorer(Rater):
    """Rates the rows of one steered call; `texts` holds the prompt of each row that is here.

    scoring: how unfinished particles are judged. weight: lambda, for values that need it. needed: whether the
    reward will be asked at all. Raises ValueError where the reward would get no text for a prompt, and where
    its weights cannot be loaded.
    """

    def __init__(
        self,
        reward: Any,
        scoring: Scoring,
        pipe: Any,
        request: Request,
        slots: Slots,
        *,
        weight: float = 0.0,
        needed: bool = True,
    ) -> None:
        texts = _reward_prompts(scoring.prompts, request, needed)
        super().__init__(reward, texts, slots, timeout=scoring.timeout, needed=needed)
        self.scoring, self.pipe, self.request, self.weight = scoring, pipe, request, weight
        self.takes_video = bool(getattr(reward, "takes_video", False))
        size = request.size.get
        self.known = KnownFrames(pipe, (size("num_frames"), size("height"), size("width")))
        self.own = PictureDecoder(pipe, **request.size)
        self.early = _early_decoder(scoring, pipe, request)

    def __call__(self, step: ScoredStep) -> Tensor:
        """Return what the states of all rows are worth at a scored step, `[P * k]`."""
        return self.slots.made(lambda: self._valued(step))

    def _valued(self, step: ScoredStep) -> Tensor:
        """Return the values `[n]` of the rows that are here; rows that are not finite get NaN."""
        where = f"step {step.index + 1} of {step.steps}"
        finite = torch.isfinite(step.x0).flatten(1).all(1).cpu()
        if not bool(finite.any()):
            raise ValueError(
                f"the latents are not finite at {where}: nothing is left to steer; try dtype float32 or "
                "bfloat16, or less guidance"
            )
        if self.scoring.value is None:
            found = self.rate(self.decoded(step.x0, self.early), where)
        else:
            found = self._by_value(self.scoring.value, step, where)
        return found if bool(finite.all()) else torch.where(finite, found, torch.nan)

    def _by_value(self, value: Value, step: ScoredStep, where: str) -> Tensor:
        """Return a value's numbers. ValueError names the call where they are not one for each row."""
        call = step.call
        state = State(
            sample=call.sample,
            output=call.model_output,
            x0=step.x0,
            level=step.here,
            prompts=self.texts,
            call=step.index,
            strength=self.weight,
            rate=lambda x: self.rate(self.decoded(x, self.early), where),
        )
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

    def decoded(
        self, x: Tensor, decode: Callable[..., Tensor] | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Return pictures of latents or tokens, by another decoder where one is given.

        rows: which rows of the call these are.
        """
        start = perf_counter()
        x = self.known.completed(x, rows)
        decode = decode or (self.own if x.is_floating_point() else partial(decode_tokens, self.pipe))
        images = self.known.shown(decode(x, batch_size=self.scoring.decode_batch_size))
        self.seconds.decode += perf_counter() - start
        if getattr(images, "shape", (0,))[0] != len(x):
            raise ValueError(
                f"the decoder must return a tensor of {len(x)} pictures for as many latents, it returned "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}"
            )
        return images

    def asked(self, items: Any, texts: list[Any]) -> Tensor:
        """Return what the reward gives for pictures or clips, in portions that fit into memory."""
        return score_pictures(self.within_time, items, texts, takes_video=self.takes_video)

    def gradient(self, x0: Tensor) -> Tensor:
        """Return the gradient of the reward with respect to clean latents, shaped like them."""

        def rate(part: Tensor, rows: slice) -> Tensor:
            images = self.decoded(part, self.early, rows)
            try:
                return rewards.ask(self.reward, images, self.texts[rows])
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise ValueError(
                    f"the reward failed while its gradient was taken, from{self.particle(rows.start)[1:]} "
                    f"on: {reason}"
                ) from error

        return reward_gradient(rate, x0, self.scoring.decode_batch_size)


def _early_decoder(scoring: Scoring, pipe: Any, request: Request) -> Callable[..., Tensor] | None:
    """Return another decoder for unfinished pictures, None for the pipeline's own way."""
    if scoring.decode is not None:
        return partial(scoring.decode, pipe, **request.size)
    return None if scoring.preview is None else PictureDecoder(pipe, **request.size, vae=scoring.preview)


def decode_tokens(pipe: Any, x: Tensor, *, batch_size: int = 4) -> Tensor:
    """Return pictures `[n, 3, h, w]` in [0, 1] of token maps `[n, h, w]`, which the pipeline's `vqvae`
    decodes `batch_size` rows at a time; sequences `[n, l]` of tokens are returned as they are.
    """
    if x.ndim == 2:
        return x
    vqvae = pipe.vqvae
    pictures = []
    for rows in x.split(batch_size):
        shape = (*rows.shape, vqvae.config.latent_channels)
        out = vqvae.decode(rows, force_not_quantize=True, shape=shape).sample
        pictures.append(out.float().clamp(0, 1))
    return torch.cat(pictures)


def _reward_prompts(given: str | Sequence[str] | None, request: Request, needed: bool) -> list[str]:
    """Return the texts that the reward gets, one per prompt of the call."""
    texts = [given] if isinstance(given, str) else given
    if texts is None and request.prompts is None and needed:
        raise ValueError(
            "the call gives prompt_embeds, so the reward would get no text: pass "
            "scoring=Scoring(prompts=[...]) to the steerer, one for each prompt"
        )
    texts = texts if texts is not None else request.prompts
    chosen = list(texts if texts is not None else ("",) * request.groups)
    if len(chosen) != request.groups:
        raise ValueError(
            f"the steerer has {len(chosen)} prompts, the call has {request.groups}: give one for each"
        )
    return chosen
