"""A reward for clips that keep the colours they began with: it selects against colour runaway."""

from __future__ import annotations

import torch
from torch import Tensor

from diffplug.video.statistics import ClipStatistics, clip_statistics, distance

__all__ = ["SteadyReward"]


class SteadyReward:
    """Minus the colour distance between a clip and an anchor: 0 is best.

    The anchor is the first clip of a long video once `anchored` was told of it; until then a clip's own first
    quarter, against its last. Takes whole clips [n, f, 3, h, w]. No weights, no network.
    """

    takes_video = True
    differentiable = False

    def __init__(self, anchor: ClipStatistics | None = None) -> None:
        self.anchor = anchor

    def anchored(self, first: Tensor | ClipStatistics) -> SteadyReward:
        """Return the reward that compares with a clip [f, 3, h, w], or with its statistics."""
        return SteadyReward(first if isinstance(first, ClipStatistics) else clip_statistics(first))

    def __call__(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """Return the scores [n] float64. Raises ValueError for single pictures."""
        if clips.ndim != 5:
            raise ValueError(
                f"steady rates clips [n, f, 3, h, w], got {tuple(clips.shape)}: it has nothing to say about "
                "a single picture"
            )
        return torch.tensor([-self._apart(clip) for clip in clips], dtype=torch.float64)

    def _apart(self, clip: Tensor) -> float:
        if self.anchor is not None:
            return distance(clip_statistics(clip), self.anchor)
        quarter = max(1, len(clip) // 4)
        return distance(clip_statistics(clip[:quarter]), clip_statistics(clip[-quarter:]))
