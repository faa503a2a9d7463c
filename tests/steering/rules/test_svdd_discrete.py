"""SVDD on a discrete model whose laws are known by enumeration (256 states)."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.steering.masked_svdd import handed_over, selected
from diffplug.testing.closed_form.masked_tokens import (
    BASE_MEAN,
    MASK,
    STEPS,
    STRENGTH,
    TARGET_MEAN,
    MaskedModel,
    Z,
)

pytestmark = pytest.mark.law

MODEL = MaskedModel()


def test_the_model_is_the_one_that_was_enumerated() -> None:
    start = int(MODEL.number(torch.full((4,), MASK)))
    law = torch.zeros(256, dtype=torch.float64)
    law[start] = 1.0
    for step in range(STEPS):
        law = law @ MODEL.kernel(step)
    assert float(law.sum()) == pytest.approx(1.0)
    assert float(law @ MODEL.reward(MODEL.states)) == pytest.approx(BASE_MEAN, abs=1e-5)
    assert float((STRENGTH * MODEL.soft_values[0][start]).exp()) == pytest.approx(Z, abs=1e-4)
    tilted = law * (STRENGTH * MODEL.soft_values[-1]).exp()
    assert float(tilted @ MODEL.reward(MODEL.states) / tilted.sum()) == pytest.approx(TARGET_MEAN, abs=1e-5)


@pytest.mark.parametrize(("m", "mean"), [(2, 0.997), (4, 1.618), (10, 2.320)])
def test_softmax_selection_reaches_the_stated_rewards(m: int, mean: float) -> None:
    x, _ = selected(MODEL, MODEL.log_mean_exp_value, 6000, m)
    assert float(handed_over(MODEL, x).mean()) == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("value", ["log_mean_exp_value", "mean_value"])
def test_the_weights_make_it_exact_for_any_value(value: str) -> None:
    x, log_z = selected(MODEL, getattr(MODEL, value), 12000, 10)
    ratio = log_z.exp() / Z
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))
    weights = ratio[:, None] * torch.softmax(STRENGTH * MODEL.reward(x), -1)
    pooled = float((weights * MODEL.reward(x)).sum() / weights.sum())
    assert pooled == pytest.approx(TARGET_MEAN, abs=0.08)


def test_greedy_selection_goes_further_and_has_no_weight() -> None:
    x, log_z = selected(MODEL, MODEL.log_mean_exp_value, 3000, 10, greedy=True)
    assert float(handed_over(MODEL, x, greedy=True).mean()) == pytest.approx(3.431, abs=0.08)
    assert bool(torch.isnan(log_z).all())
