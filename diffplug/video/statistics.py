"""Numbers that tell whether a long video drifts, measured without any reference video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_keys

__all__ = ["ClipStatistics", "Join", "clip_statistics", "distance", "jump_ratio", "psnr", "slope"]


@dataclass(frozen=True)
class ClipStatistics:
    """What a clip looks like on average.

    mean, std: of each colour channel over pixels and frames. saturation: mean of largest minus smallest
    channel. sharpness: variance of the Laplacian of the brightness. motion: mean absolute difference of
    neighbouring frames, NaN for a single frame. All of pixels in [0, 1].
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    saturation: float
    sharpness: float
    motion: float

    @property
    def level(self) -> float:
        """The mean over the channels."""
        return sum(self.mean) / 3

    @property
    def contrast(self) -> float:
        """The deviation, averaged over the channels."""
        return sum(self.std) / 3

    def as_mapping(self) -> dict[str, Any]:
        """Return the numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ClipStatistics:
        """Return what `as_mapping` was called on. Raises ValueError for unknown keys."""
        check_keys("clip's statistics", values, list(cls.__dataclass_fields__))
        told = {name: float(values[name]) for name in ("saturation", "sharpness", "motion")}
        return cls(mean=_channels(values["mean"]), std=_channels(values["std"]), **told)


def _channels(values: Sequence[Any]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class Join:
    """How two clips meet.

    seam: PSNR in dB between the frames that were handed over and what the next clip made of them; infinite
    where it kept them. jump: the step from the last kept frame to the first new one, in median steps of the
    clip: 1 is smooth.
    """

    frame: int
    seam: float
    jump: float


def clip_statistics(frames: Tensor) -> ClipStatistics:
    """Return the statistics of a clip [f, 3, h, w] in [0, 1]."""
    x = frames.double()
    luma = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    edges = 4 * luma[:, 1:-1, 1:-1] - luma[:, :-2, 1:-1] - luma[:, 2:, 1:-1]
    edges = edges - luma[:, 1:-1, :-2] - luma[:, 1:-1, 2:]
    red, green, blue = x.mean((0, 2, 3)).tolist()
    deviations = x.std((0, 2, 3), correction=0).tolist()
    return ClipStatistics(
        mean=(red, green, blue),
        std=(deviations[0], deviations[1], deviations[2]),
        saturation=float((x.amax(1) - x.amin(1)).mean()),
        sharpness=float(edges.var(correction=0)),
        motion=float((x[1:] - x[:-1]).abs().mean()) if len(x) > 1 else math.nan,
    )


def distance(a: ClipStatistics, b: ClipStatistics) -> float:
    """Return the root mean square distance of two clips in means, deviations and saturation."""
    pairs = [*zip(a.mean, b.mean, strict=True), *zip(a.std, b.std, strict=True), (a.saturation, b.saturation)]
    return math.sqrt(sum((x - y) ** 2 for x, y in pairs) / len(pairs))


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two tensors in [0, 1], dB; infinite where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def jump_ratio(last: Tensor, clip: Tensor) -> float:
    """Return the mean absolute step from a frame [3, h, w] to a clip's first, in median steps of the clip.

    NaN for a clip without motion that starts without a step; infinite for one that starts with a step.
    """
    step = float((clip[0].double() - last.double()).abs().mean())
    if len(clip) < 2:
        return math.nan
    usual = float((clip[1:].double() - clip[:-1].double()).abs().mean((1, 2, 3)).median())
    return step / usual if usual else (math.inf if step else math.nan)


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares slope a step of a series, and its standard error; NaN for short series."""
    y = torch.tensor(values, dtype=torch.float64)
    n = len(y)
    if n < 3:
        return math.nan, math.nan
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    found = (x * y).sum() / x.square().sum()
    rest = y - y.mean() - found * x
    return float(found), float((rest.square().sum() / (n - 2) / x.square().sum()).sqrt())
