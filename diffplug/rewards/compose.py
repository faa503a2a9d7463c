"""Rewards made of rewards: weighted sums, and scores brought to mean 0 and deviation 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffplug.pictures import score_pictures
from diffplug.rewards import Reward, check_prompts, prepare, score

__all__ = ["Standardised", "Weighted", "anchored"]


class Weighted:
    """The weighted sum of some rewards; a weight of -1 turns one around.

    Costs one call of each. Differentiable where all of them are.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"{len(rewards)} rewards and {len(weights)} weights: give one weight for each")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights are {list(weights)}: they must be finite")
        self.rewards, self.weights = tuple(rewards), tuple(float(weight) for weight in weights)

    @property
    def differentiable(self) -> bool:
        return all(getattr(reward, "differentiable", False) for reward in self.rewards)

    @property
    def takes_video(self) -> bool:
        """Whether a part wants whole clips; the others then rate their frames."""
        return any(getattr(reward, "takes_video", False) for reward in self.rewards)

    def anchored(self, first: Any) -> Weighted:
        """Return the sum whose parts that compare with a first clip are told of it."""
        return Weighted([anchored(reward, first) for reward in self.rewards], self.weights)

    def prepare(self) -> None:
        """Load what the parts need."""
        for reward in self.rewards:
            prepare(reward)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that a part cannot read."""
        for reward in self.rewards:
            check_prompts(reward, prompts)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64 on the CPU."""
        parts = [_part(reward, images, prompts) for reward in self.rewards]
        terms = [weight * part for weight, part in zip(self.weights, parts, strict=True)]
        return torch.stack(terms).sum(0)


def anchored(reward: Any, first: Any) -> Any:
    """Return a reward that was told of a video's first clip, or its statistics, where it wants to know."""
    own = getattr(reward, "anchored", None)
    return own(first) if callable(own) else reward


def _part(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Return a part's scores; of clips, one that rates pictures gives the mean over the frames."""
    if images.ndim != 5:
        return score(reward, images, prompts, graph=True)
    takes = bool(getattr(reward, "takes_video", False))
    return score_pictures(
        lambda x, texts: score(reward, x, texts, graph=True), images, prompts, takes_video=takes
    )


class Standardised:
    """A reward minus a mean, divided by a deviation, so that rewards of different units can be added.

    With `mean` and `std` given the scale is fixed. Without, it is that of all finite scores so far, the
    present call included: comparable within a call, but it moves between calls, so steerers that compare a
    particle with its own past want given numbers, or `freeze()` after some pictures.
    """

    def __init__(self, reward: Reward, *, mean: float | None = None, std: float | None = None) -> None:
        if (mean is None) != (std is None):
            raise ValueError("give mean and std together, or neither for running ones")
        if mean is not None and std is not None and not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"mean {mean} and std {std}: mean must be finite and std finite and above 0")
        self.reward = reward
        self.running = mean is None
        self._count = 0
        self._mean = 0.0 if mean is None else mean
        self._std = 1.0 if std is None else std
        self._spread = 0.0  # sum of squared deviations from the mean

    @property
    def differentiable(self) -> bool:
        return bool(getattr(self.reward, "differentiable", False))

    @property
    def takes_video(self) -> bool:
        """Whether the reward wants whole clips."""
        return bool(getattr(self.reward, "takes_video", False))

    @property
    def mean(self) -> float:
        """The mean that is taken off."""
        return self._mean

    @property
    def std(self) -> float:
        """The deviation that is divided by; 1 while there is none to measure."""
        if self.running and self._count > 1:
            return math.sqrt(self._spread / (self._count - 1)) or 1.0
        return self._std

    def freeze(self) -> Standardised:
        """Keep the present mean and deviation from now on; returns the reward itself."""
        self._std, self.running = self.std, False
        return self

    def prepare(self) -> None:
        """Load what the reward needs."""
        prepare(self.reward)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that the reward cannot read."""
        check_prompts(self.reward, prompts)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] float64 on the CPU."""
        scores = score(self.reward, images, prompts, graph=True)
        if self.running:
            self._include(scores.detach())
        return (scores - self.mean) / self.std

    def _include(self, scores: Tensor) -> None:
        """Merge the finite scores into mean and spread (Chan's rule, stable for any size of batch)."""
        fresh = scores[torch.isfinite(scores)]
        if not len(fresh):
            return
        mean, spread = fresh.mean().item(), (fresh - fresh.mean()).square().sum().item()
        count = self._count + len(fresh)
        step = mean - self._mean
        self._spread += spread + step * step * self._count * len(fresh) / count
        self._mean += step * len(fresh) / count
        self._count = count
