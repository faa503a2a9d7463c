"""SVDD on the masked token model: what survives, and what it is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import one_survivor, the_best
from diffplug.testing.closed_form.masked_tokens import LENGTH, MASK, STEPS, STRENGTH, MaskedModel


def selected(
    model: MaskedModel, value: Tensor, groups: int, m: int, *, greedy: bool = False
) -> tuple[Tensor, Tensor]:
    """Return finished sequences `[groups, m, 4]` and log normalisers `[groups]` of SVDD.

    One of m candidates survives at every step by its value `[256]`: by softmax, or the best one.
    """
    generator = torch.Generator().manual_seed(11)
    filt = ParticleFilter(
        groups=groups,
        particles=m,
        potential=Difference(strength=STRENGTH, tilt="constant"),
        generators=[torch.Generator().manual_seed(12)],
        resampler=the_best if greedy else one_survivor,
    )
    x = torch.full((groups, m, LENGTH), MASK)
    for step in range(STEPS):
        picked = filt.select(value[model.number(x)], call=step, progress=1.0)
        x = model.step(x.gather(1, picked.ancestors[..., None].expand_as(x)), step, generator)
    return x, filt.finish(model.reward(x))[1]


def handed_over(model: MaskedModel, x: Tensor, *, greedy: bool = False) -> Tensor:
    """Return the expected reward `[groups]` of the candidate that each group of `selected` hands over."""
    reward = model.reward(x)
    if greedy:
        return reward.amax(-1)
    return (torch.softmax(STRENGTH * reward, -1) * reward).sum(-1)
