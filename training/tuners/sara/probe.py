"""Whether "small means idle" holds for a model: what zeroing its smallest weights does to a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffplug.sara.targets import components_of, values_at, write_at
from diffplug.training.tuners.sara.candidates import candidates, checked
from diffplug.training.tuners.sara.scores import score_of
from diffplug.training.tuners.sara.select import Choice, choose

__all__ = ["Probe", "probe_threshold"]


@dataclass(frozen=True)
class Probe:
    """The loss with all weights below `threshold` at zero. change: relative to that of the whole model."""

    threshold: float
    density: float
    loss: float
    change: float


@torch.no_grad()
def probe_threshold(
    component: nn.Module,
    loss: Callable[[], Any],
    *,
    densities: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    thresholds: Sequence[float] = (),
    include_1d: bool = False,
) -> list[Probe]:
    """Return what zeroing the smallest weights costs, by share (or by threshold where some are given).

    loss: called without arguments, a number; use the same pictures, timesteps and noise in every call. The
    weights are what they were afterwards, to the bit. Where a few per cent already change the loss, SaRA's
    premise does not hold for the model: take a smaller density, or LoRA.
    """
    weights = candidates(checked(components_of(component)), (), (), include_1d)
    total = sum(value.numel() for value in weights.values())
    before, score = float(loss()), score_of("magnitude")
    if thresholds:
        choices = (choose(weights, score, threshold=each) for each in thresholds)
    else:
        choices = (choose(weights, score, count=max(1, round(each * total))) for each in densities)
    probes = []
    for choice in choices:
        now = _zeroed(weights, choice, loss)
        probes.append(Probe(choice.threshold, choice.density, now, now / before - 1))
    return probes


def _zeroed(weights: dict[str, nn.Parameter], choice: Choice, loss: Callable[[], Any]) -> float:
    kept = {name: values_at(value, choice.index[name]) for name, value in weights.items()}
    for name, value in weights.items():
        write_at(value, choice.index[name], torch.zeros_like(kept[name]))
    try:
        return float(loss())
    finally:
        for name, value in weights.items():
            write_at(value, choice.index[name], kept[name])
