"""The Shapes grader as a reward: the share of the prompt's facts that hold in the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from diffplug.shapes.captions import parse
from diffplug.shapes.grading import grade


class ShapesReward:
    """A reward in [0, 1] for pictures of the Shapes world; costs about 5 ms a picture on one core.

    Args:
        strict: give 1 only where every fact holds, else 0.
    """

    differentiable = False
    best = 1.0
    """Every fact holds: what `BestOfN(enough=...)` may wait for."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    @classmethod
    def from_spec(cls, text: str) -> ShapesReward:
        """From the word "strict"."""
        if text != "strict":
            raise ValueError(
                f"shapes:{text}: write 'shapes', or 'shapes:strict' for 1 only where every fact holds"
            )
        return cls(strict=True)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is not about the Shapes world."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> np.ndarray:
        """Scores of pictures [n, 3, h, w] in [0, 1] for n prompts: [n] float64."""
        grades = grade(images, prompts)
        return grades.strict.astype(np.float64) if self.strict else grades.score
