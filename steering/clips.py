"""Selection clip by clip: at every join of a long video several continuations are drawn and one is kept.

    long = LongVideo(pipe, frames=241, overlap=5, select=ClipSelection("0.8*clip + 0.2*steady", candidates=4))

This is SVDD (arXiv 2408.08252) with "one clip" for "one step". With softmax selection the kept video carries
an importance weight for the law of the chained sampler,

    lw = sum_k [ log mean_m exp(strength v_k,m) - strength v_(k-1, kept) ]

where v is the value of the video so far: E[exp(lw)] = Z and E[exp(lw) f(x)] = Z E_tilted[f(x)] for every
number of candidates. Memory is that of the candidates of one clip, however long the video.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.checks import check_whole
from diffplug.pictures import score_pictures
from diffplug.registry import unknown
from diffplug.rewards.compose import anchored
from diffplug.steering.smc.resampling import multinomial
from diffplug.steering.smc.weights import log_mean_exp

__all__ = ["ClipSelection", "ClipWeights"]

_RULES = ("softmax", "greedy")


@dataclass
class ClipWeights:
    """One chain of selections, without any video: which candidate survives, and the chain's log weight.

    strength: lambda of exp(lambda v). greedy: the best survives; then no weight belongs to the chain.
    """

    strength: float
    greedy: bool = False
    log_weight: float | None = 0.0
    last: float = 0.0

    def select(self, values: Sequence[float], u: float) -> int:
        """Return the survivor among candidates worth `values`, given a uniform number, and update the weight.

        values: of the video up to and with each candidate; NaN is a candidate that cannot survive. Raises
        ValueError where all are NaN.
        """
        v = torch.as_tensor(values, dtype=torch.float64)
        if bool(torch.isnan(v).all()):
            raise ValueError(f"every one of {len(v)} clips was rated NaN: nothing is left to choose from")
        if self.greedy:
            self.log_weight = None
            return int(torch.nan_to_num(v, nan=-math.inf).argmax())
        logw = self.strength * v
        kept = int(multinomial(logw[None], torch.tensor([[u]], dtype=torch.float64))[0, 0])
        gain = float(log_mean_exp(logw)) - self.last
        self.log_weight = (self.log_weight or 0.0) + gain
        self.last = float(logw[kept])
        return kept


@dataclass
class ClipSelection:
    """Keeps one of several candidates for every clip of a long video, by a reward.

    reward: a reward, its name or a spec; one that rates pictures gives the mean over the frames. candidates:
    clips drawn at every join (each costs a call of the pipeline). rule: "softmax" draws one with probability
    proportional to exp(strength v), and keeps an importance weight; "greedy" takes the best. strength: of the
    softmax alone; v is the mean reward of the clips so far.
    Raises ValueError for unknown names and bad numbers.
    """

    reward: Any
    candidates: int = 4
    rule: str = "softmax"
    strength: float = 10.0
    _weights: ClipWeights = field(init=False, repr=False)
    _sum: float = field(init=False, repr=False, default=0.0)
    _clips: int = field(init=False, repr=False, default=0)
    _rated: Any = field(init=False, repr=False, default=None)
    _told: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_whole("candidates", self.candidates)
        if self.rule not in _RULES:
            raise unknown("selection rule", self.rule, list(_RULES))
        if not (
            isinstance(self.strength, (int, float)) and math.isfinite(self.strength) and self.strength >= 0
        ):
            raise ValueError(f"strength={self.strength!r}: it must be a finite number of at least 0")
        if self.rule == "greedy" and self.strength != type(self).strength:
            raise ValueError(
                f"strength={self.strength!r} does nothing with rule='greedy': leave it out, or take "
                "rule='softmax'"
            )
        if self.candidates == 1:
            raise ValueError("candidates=1 selects nothing: take 2 or more, or leave select= out")
        self._rated = rewards.get(self.reward) if isinstance(self.reward, str) else self.reward
        if not callable(self._rated):
            raise ValueError(f"reward={self.reward!r}: give a reward, or the name of one")
        self.begin()

    def begin(self, state: Mapping[str, Any] | None = None) -> None:
        """Forget an earlier video, or go on from what `state` returned."""
        self._weights = ClipWeights(self.strength, greedy=self.rule == "greedy")
        self._sum, self._clips, self._told = 0.0, 0, self._rated
        if state:
            self._weights.log_weight, self._weights.last = state["log_weight"], state["last"]
            self._sum, self._clips = state["sum"], state["clips"]

    def state(self) -> dict[str, Any]:
        """Return what a video is continued with, ready for JSON."""
        weights = self._weights
        return {
            "log_weight": weights.log_weight,
            "last": weights.last,
            "sum": self._sum,
            "clips": self._clips,
        }

    @property
    def log_weight(self) -> float | None:
        """The log importance weight of the video so far; None where selection is greedy."""
        return self._weights.log_weight

    def compare_with(self, first: Any) -> None:
        """Tell a reward that compares with the first clip (`steady`) of that clip's statistics."""
        self._told = anchored(self._rated, first)

    def choose(self, clips: Sequence[Tensor], prompt: str, seed: int) -> tuple[int, list[float]]:
        """Return the number of the clip that is kept, and the reward of each.

        clips: candidates [f, 3, h, w]. seed: of the draw.
        """
        found = self.rate(clips, prompt)
        values = [(self._sum + r) / (self._clips + 1) for r in found]
        u = float(torch.rand((), generator=torch.Generator().manual_seed(seed ^ 0xC119), dtype=torch.float64))
        kept = self._weights.select(values, u)
        self._sum, self._clips = self._sum + found[kept], self._clips + 1
        return kept, found

    def rate(self, clips: Sequence[Tensor], prompt: str) -> list[float]:
        """Return the reward of each clip, one clip at a time."""
        takes = bool(getattr(self._told, "takes_video", False))
        ask = partial(rewards.score, self._told)
        return [float(score_pictures(ask, clip[None], [prompt], takes_video=takes)[0]) for clip in clips]
