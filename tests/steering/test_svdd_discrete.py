"""SVDD on a discrete model whose laws are known by enumeration (256 states)."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.steering.masked_model import BASE_MEAN, MASK, STEPS, STRENGTH, TARGET_MEAN, MaskedModel, Z
from diffplug.steering.particle_filter import ParticleFilter
from diffplug.steering.potentials import Difference
from diffplug.steering.selection import one_survivor, the_best

pytestmark = pytest.mark.law

MODEL = MaskedModel()


def decode(
    value: torch.Tensor, groups: int, m: int, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return finished sequences `[groups, m, 4]` and log normalisers `[groups]`."""
    generator = torch.Generator().manual_seed(11)
    filt = ParticleFilter(
        groups=groups,
        particles=m,
        potential=Difference(strength=STRENGTH, tilt="constant"),
        generators=[torch.Generator().manual_seed(12)],
        resampler=the_best if greedy else one_survivor,
    )
    x = torch.full((groups, m, 4), MASK)
    for step in range(STEPS):
        chosen = filt.select(value[MODEL.number(x)], call=step, progress=1.0)
        x = x.gather(1, chosen.ancestors[..., None].expand_as(x))
        x = MODEL.step(x, step, generator)
    return x, filt.finish(MODEL.reward(x))[1]


def chosen_reward(x: torch.Tensor, greedy: bool = False) -> float:
    """Return the mean reward of the candidate that each group hands over."""
    reward = MODEL.reward(x)
    if greedy:
        return float(reward.amax(-1).mean())
    return float((torch.softmax(STRENGTH * reward, -1) * reward).sum(-1).mean())


def soft_values() -> list[torch.Tensor]:
    """Return exp(strength * v) of every state before each step and at the end, exactly."""
    values = [(STRENGTH * MODEL.reward(MODEL.states)).exp()]
    for step in reversed(range(STEPS)):
        values.insert(0, MODEL.kernel(step) @ values[0])
    return values


def test_the_model_is_the_one_that_was_enumerated() -> None:
    start = int(MODEL.number(torch.full((4,), MASK)))
    law = torch.zeros(256, dtype=torch.float64)
    law[start] = 1.0
    for step in range(STEPS):
        law = law @ MODEL.kernel(step)
    assert float(law.sum()) == pytest.approx(1.0)
    assert float(law @ MODEL.reward(MODEL.states)) == pytest.approx(BASE_MEAN, abs=1e-5)
    assert float(soft_values()[0][start]) == pytest.approx(Z, abs=1e-4)
    tilted = law * soft_values()[-1]
    assert float(tilted @ MODEL.reward(MODEL.states) / tilted.sum()) == pytest.approx(TARGET_MEAN, abs=1e-5)


@pytest.mark.parametrize(("m", "mean"), [(2, 0.997), (4, 1.618), (10, 2.320)])
def test_softmax_selection_reaches_the_stated_rewards(m: int, mean: float) -> None:
    x, _ = decode(MODEL.log_mean_exp_value, 6000, m)
    assert chosen_reward(x) == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("value", ["log_mean_exp_value", "mean_value"])
def test_the_weights_make_it_exact_for_any_value(value: str) -> None:
    x, log_z = decode(getattr(MODEL, value), 12000, 10)
    ratio = log_z.exp() / Z
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))
    weights = ratio[:, None] * torch.softmax(STRENGTH * MODEL.reward(x), -1)
    pooled = float((weights * MODEL.reward(x)).sum() / weights.sum())
    assert pooled == pytest.approx(TARGET_MEAN, abs=0.08)


def test_greedy_selection_goes_further_and_has_no_weight() -> None:
    x, log_z = decode(MODEL.log_mean_exp_value, 3000, 10, greedy=True)
    assert chosen_reward(x, greedy=True) == pytest.approx(3.431, abs=0.08)
    assert bool(torch.isnan(log_z).all())
