"""Gauges that tell what a reward does not: sharpness, diversity, a second judge; against the start model.

A run that is paid by a reward may pay in blur. Every `every` updates the same prompts are drawn from the same
seeds, as the student is drawn; where the sharpness of edges has moved by more than
`max_blur`, the run ends with the weights that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffplug.training.preference.scorer import PictureScorer

__all__ = ["GaugeSettings", "Gauges", "diversity", "edge_sharpness"]


def edge_sharpness(images: Tensor) -> float:
    """Return the mean |Laplacian| of pictures [n, 3, h, w] at edges: where a 5x5 neighbourhood spans > 0.1.

    Taken over all pixels it would count objects. NaN where there is no edge at all.
    """
    grey = images.mean(1, keepdim=True)
    span = F.max_pool2d(grey, 5, 1, 2) + F.max_pool2d(-grey, 5, 1, 2)
    kernel = grey.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    bend = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel).abs()
    return float(bend[span > 0.1].mean())


def diversity(images: Tensor, groups: int) -> float:
    """Return the RMS distance of pictures of one prompt; images [groups * k, ...], prompt after prompt."""
    small = F.adaptive_avg_pool2d(images, 16).flatten(1).view(groups, -1, 3 * 16 * 16)
    gap = small[:, :, None] - small[:, None]
    k = small.shape[1]
    return float((gap.square().mean(-1).sum((1, 2)) / max(k * (k - 1), 1)).mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class GaugeSettings:
    """every: updates between two looks, 0 for none. prompts: how many, `seeds` pictures each. max_blur: the
    relative change of edge sharpness that ends the run. judge: a second reward that is not trained on."""

    every: int = 20
    prompts: int = 8
    seeds: int = 2
    max_blur: float = 0.15
    judge: str | None = None

    def __post_init__(self) -> None:
        if self.every < 0 or self.prompts < 1 or self.seeds < 1:
            raise ValueError("gauges: every is at least 0, prompts and seeds at least 1")
        if not self.max_blur > 0:
            raise ValueError(f"gauges: max_blur must be above 0, got {self.max_blur}")


class Gauges:
    """Looks at a fixed set of pictures. draw: returns the final latents [prompts * seeds, ...] of the model
    as it is now, prompt after prompt."""

    def __init__(
        self,
        settings: GaugeSettings,
        draw: Callable[[], Tensor],
        scorer: PictureScorer,
        prompts: Sequence[str],
    ) -> None:
        self.settings, self.draw, self.scorer = settings, draw, scorer
        self.words = [prompt for prompt in prompts for _ in range(settings.seeds)]
        self.judge = PictureScorer(scorer.pipe, settings.judge) if settings.judge else None
        self.first = torch.full((), float("nan"), dtype=torch.float64)
        self.moved = torch.zeros((), dtype=torch.float64)

    @property
    def reason(self) -> str:
        """Why the run should end; empty to go on."""
        moved = float(self.moved)
        if not abs(moved) > self.settings.max_blur:  # nor where it is no number: pictures without an edge
            return ""
        return f"edges are {'softer' if moved < 0 else 'harder'} by {abs(moved):.0%} than the start model's"

    def due(self, update: int) -> bool:
        """Whether it is time."""
        return bool(self.settings.every) and update % self.settings.every == 0

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return the figures of the model as it is now, and remember the first ones."""
        images = self.scorer.images(self.draw())
        sharp = edge_sharpness(images)
        if not bool(self.first.isfinite()):
            self.first.fill_(sharp)
        moved = sharp / float(self.first) - 1
        self.moved.fill_(moved)
        found = {
            "gauge_sharpness": 1 + moved,
            "gauge_diversity": diversity(images, len(self.words) // self.settings.seeds),
        }
        found["gauge_reward"] = float(self.scorer.judge(images, self.words).mean())
        if self.judge is not None:
            found["gauge_judge"] = float(self.judge.judge(images, self.words).mean())
        return found
