"""Latents to scores: decoded in slices, judged by a reward, checked.

Any reward of `diffplug.rewards` judges final pictures. A step scorer judges what is predicted on the way; it
is a callable (x0hat latents [n, ...], prompts, timestep) -> scores [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.latents import decode

__all__ = ["PictureScorer", "StepScorer", "X0Proxy", "checked"]


class StepScorer(Protocol):
    """Judges clean predictions on the way."""

    def __call__(self, x0: Tensor, prompts: Sequence[str], timestep: float) -> Tensor:
        """Return scores [n] float64 of x0hat [n, ...], predicted at `timestep`."""


class PictureScorer:
    """What a reward says of latents. max_rows: pictures that are decoded at once."""

    def __init__(self, pipe: Any, reward: str | Any, *, max_rows: int = 32) -> None:
        self.pipe, self.max_rows = pipe, max_rows
        self.name = reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)
        self.reward = rewards.get(reward) if isinstance(reward, str) else reward

    def prepare(self, prompts: Sequence[str]) -> None:
        """Load the reward's weights, and raise ValueError for prompts that it cannot read."""
        rewards.prepare(self.reward)
        rewards.check_prompts(self.reward, prompts)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Return pictures [n, 3, h, w] in [0, 1] of latents [n, ...]."""
        vae = getattr(self.pipe, "vae", None)
        dtype = latents.dtype if vae is None else next(vae.parameters()).dtype
        parts = [decode(self.pipe, part.to(dtype)).float() for part in latents.split(self.max_rows)]
        return torch.cat(parts)

    def judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [n] float64 on the CPU of pictures."""
        return checked(rewards.score(self.reward, images, prompts), self.name)

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [n] float64 on the CPU of latents [n, ...]."""
        return self.judge(self.images(latents), prompts)


class X0Proxy:
    """A step scorer from any reward: it judges x0hat as if it were the picture; weak where noise is high."""

    def __init__(self, scorer: PictureScorer) -> None:
        self.scorer = scorer

    def __call__(self, x0: Tensor, prompts: Sequence[str], timestep: float) -> Tensor:
        """Return the reward's scores of x0hat."""
        return self.scorer(x0, prompts)


def checked(scores: Tensor, name: str) -> Tensor:
    """Return scores; ValueError where one of them is no finite number."""
    bad = ~scores.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"reward {name!r} gave {float(scores[bad][0])} for {int(bad.sum())} of {len(scores)} pictures: a "
            "preference needs finite scores"
        )
    return scores
