"""Figures by a reward and sheets of pictures, always of the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffplug import rewards
from diffplug.files import atomic_path
from diffplug.training.student import Sampling, draw

__all__ = ["Figures", "ValidationSettings", "save_sheet", "validate"]


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """What is drawn at checkpoints and at the end.

    prompts: a text file, or "shapes:search" for the embedded world; None for the first training prompts.
    count: pictures scored at the end. sheet: pictures of a sheet. reward: what judges, None for sheets alone.
    """

    prompts: str | None = None
    count: int = 100
    sheet: int = 16
    seed: int = 0
    reward: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.sheet < 1:
            raise ValueError(f"count and sheet are at least 1, got {self.count} and {self.sheet}")


@dataclass(frozen=True)
class Figures:
    """Mean score of n pictures with its standard error, and the share of those that score 1."""

    n: int
    mean: float
    error: float
    best: float

    @classmethod
    def of(cls, scores: Tensor) -> Figures:
        """Return the figures of scores [n]; NaN counts as 0 in `best`, and is left out of the mean."""
        known = scores[scores.isfinite()]
        error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        return cls(len(scores), float(known.mean()), error, float((scores >= 1).double().mean()))

    @property
    def best_error(self) -> float:
        """The standard error of `best`."""
        return math.sqrt(self.best * (1 - self.best) / self.n)


def validate(
    pipe: Any,
    sampling: Sampling,
    prompts: Sequence[str],
    told: ValidationSettings,
    *,
    call: Mapping[str, Any] | None = None,
    sheet: Path | None = None,
) -> Figures | None:
    """Draw a sheet, and return the figures of `told.count` pictures where a reward judges them."""
    n = told.count if told.reward is not None else told.sheet
    words = [prompts[i % len(prompts)] for i in range(max(n, told.sheet))]
    seeds = [told.seed + i for i in range(len(words))]
    drawn = draw(pipe, sampling, words, seeds, call=call)
    if sheet is not None:
        save_sheet(drawn.images[: told.sheet], sheet)
    if told.reward is None:
        return None
    return Figures.of(rewards.score(rewards.get(told.reward), drawn.images[:n], words[:n]))


def save_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures [n, 3, h, w] in [0, 1] as one PNG, row by row; the last row may be short."""
    n, _, h, w = images.shape
    across = min(columns, n)
    sheet = torch.ones(3, -(-n // across) * (h + 2), across * (w + 2))
    for i, image in enumerate(images):
        y, x = (i // across) * (h + 2), (i % across) * (w + 2)
        sheet[:, y : y + h, x : x + w] = image.clamp(0, 1)
    pixels = (sheet * 255).round().byte().permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
