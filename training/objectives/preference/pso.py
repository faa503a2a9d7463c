"""Pairwise Sample Optimization (PSO, arXiv 2410.03190): a few-step model learns what a reward prefers.

    L = -log sigmoid(beta sum_n [l_n(w) - l_n(l)]) + anchor |x0hat - x0hat_ref|^2

w, l are the best and the worst of a prompt's candidates, drawn by the model itself; l_n the log-ratios of
policy and start model over the steps of its own sampler. No loss of denoising is involved, which would draw
the sharp predictions of a distilled model back to blurred means. The last step of most samplers draws no
noise and so has no l_n; the anchor holds its prediction to the start model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffplug.training.objective import Loss
from diffplug.training.preference.online import Drawn, Online, OnlineSettings
from diffplug.training.preference.pair_loss import Clip, Reduce, check_clip, pair_loss
from diffplug.training.preference.selectors import Pairs, all_pairs, best_worst

__all__ = ["PSO", "PSOSettings"]


@dataclass(frozen=True, kw_only=True)
class PSOSettings(OnlineSettings):
    """The table [objective] of `pso`.

    beta: of the preference. reduce: steps inside one sigmoid ("trajectory"), one loss a step ("step"), or by
    their number ("auto": up to 4 together). clip: "none", "two_sided" as in the published code, or "ppo";
    epsilon: how far a ratio may go. anchor: weight at the deterministic steps, None for 0.2 beta. min_gap:
    scores that differ by no more are a tie. pairs: the best against the worst, or "all".
    """

    beta: float = 100.0
    reduce: Literal["auto", "trajectory", "step"] = "auto"
    clip: Clip = "none"
    epsilon: float = 0.1
    anchor: float | None = None
    min_gap: float = 0.0
    pairs: Literal["best-worst", "all"] = "best-worst"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        check_clip(self.clip, self.epsilon, PSOSettings.epsilon)
        if self.min_gap < 0 or (self.anchor or 0) < 0:
            raise ValueError("min_gap and anchor must be at least 0")

    @property
    def anchored(self) -> float:
        """The weight of the anchor."""
        return 0.2 * self.beta if self.anchor is None else self.anchor


class PSO(Online):
    """Online PSO; see `Online` for roll-outs."""

    Settings = PSOSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"precision": "bf16", "batch": 32, "updates": 80, "save_every": 20},
        "optimizer": {"lr": 2e-5, "warmup": 5, "ema": 0.98, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }

    def compared(self, drawn: Drawn) -> Loss:
        """Return the loss of each prompt whose candidates differ; the others weigh nothing."""
        told, n = self.settings, len(drawn.scores)
        pairs = self.selected(drawn)
        if not len(pairs):
            nothing = torch.zeros(n, device=drawn.paths.states.device)
            return Loss(nothing, nothing)
        k = drawn.scores.shape[1]
        which = torch.cat([pairs.row * k + pairs.winner, pairs.row * k + pairs.loser])
        found = self.transitions(drawn, which, anchor=told.anchored > 0)
        ell_w, ell_l = found.ell.chunk(2)
        steps = found.ell.shape[1]
        together: Reduce = "trajectory" if steps <= 4 else "step"
        reduce = together if told.reduce == "auto" else told.reduce
        loss = pair_loss(ell_w, ell_l, beta=told.beta, reduce=reduce, clip=told.clip, epsilon=told.epsilon)
        gap = torch.cat(found.anchor.chunk(2)).view(2, -1).mean(0)
        errors = loss.errors + told.anchored * gap
        log = {**loss.log, "pair_loss": loss.errors.detach().mean(), "anchor": gap.detach().mean()}
        log |= {"kept": torch.tensor(len(pairs.row.unique()) / n)}
        log |= {f"kl_{i}": found.kl[:, j].detach().mean() for j, i in enumerate(self.kernel.trainable)}
        return _by_row(errors, pairs, n, log)

    def figures(self) -> list[str]:
        """The names in the log."""
        names = ["accuracy", "logit", "winner", "loser", "clipped", "pair_loss", "anchor", "kept"]
        return [*names, *(f"kl_{i}" for i in self.kernel.trainable)]

    def selected(self, drawn: Drawn) -> Pairs:
        """Return who wins."""
        select = best_worst if self.settings.pairs == "best-worst" else all_pairs
        return select(drawn.scores, self.settings.min_gap)


def _by_row(errors: torch.Tensor, pairs: Pairs, n: int, log: dict[str, torch.Tensor]) -> Loss:
    """Return the mean loss of each row's pairs; rows without a pair weigh nothing."""
    row = pairs.row.to(errors.device)
    zero = errors.new_zeros(n)
    count = zero.index_add(0, row, torch.ones_like(errors))
    summed = zero.index_add(0, row, errors)
    return Loss(summed / count.clamp(min=1), (count > 0).to(errors.dtype), log=log)
