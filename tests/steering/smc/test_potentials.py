"""Potentials: their statistics by hand, and that every one of them closes on strength * reward."""

import math

import pytest
import torch

from benchmarks.steering.chain import steer
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import POTENTIALS, TILTS, Difference, potential
from diffplug.testing.closed_form.chain import GAUSSIAN

pytestmark = pytest.mark.law

NAN, DEAD = math.nan, -math.inf
PATH = torch.tensor([[[1.0, NAN]], [[3.0, 2.0]], [[2.0, DEAD]]], dtype=torch.float64)
Z_GAUSSIAN = 10.2877135  # data N(1, .25), r = x, lambda = 2


def build(
    name: str, tilt: str, groups: int, k: int, strength: float, threshold: float | None
) -> ParticleFilter:
    """Return a filter with one stream."""
    return ParticleFilter(
        groups=groups,
        particles=k,
        potential=potential(name, strength=strength, tilt=tilt, target_ess=0.7),
        generators=[torch.Generator().manual_seed(3)],
        ess_threshold=threshold,
    )


@pytest.mark.parametrize(
    ("name", "first"), [("difference", 2.0), ("max-increment", 3.0), ("max", 1 + 3 + 3), ("sum", 1 + 4 + 6)]
)
def test_statistics_by_hand(name: str, first: float) -> None:
    full = potential(name, strength=0.5).full(PATH)
    assert full.tolist() == [[0.5 * first, DEAD]]
    before = potential(name, strength=1.0).full(PATH[:2])
    assert before[0, 1] == 2.0, "a call that was not scored counts for nothing"


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("name", POTENTIALS)
def test_every_potential_closes_on_strength_times_reward(
    name: str, tilt: str, threshold: float | None
) -> None:
    """What was taken at the selections of a lineage plus its final weight is lambda * r."""
    filt = build(name, tilt, 3, 5, 2.5, threshold)
    generator = torch.Generator().manual_seed(0)
    spent = torch.zeros(3, 5, dtype=torch.float64)
    for call in range(6):
        scores = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        chosen = filt.select(scores, call=call, progress=(call + 1) / 7)
        taken = torch.where(chosen.resampled[:, None], chosen.log_weights, 0.0)
        spent = (spent + taken).gather(-1, chosen.ancestors)
    final = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(spent + filt.finish(final)[0], 2.5 * final, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "tilt", "mean"),
    [("max-increment", "constant", 1.225), ("max", "constant", 1.244), ("difference", "adaptive", None)],
)
def test_the_normaliser_is_unbiased_for_every_potential(name: str, tilt: str, mean: float | None) -> None:
    run = steer(
        GAUSSIAN,
        lambda x: x,
        strength=2.0,
        groups=6000,
        plan=lambda n: [4, 8, 12, 16],
        make_filter=lambda groups: build(name, tilt, groups, 4, 2.0, 0.9 if tilt == "adaptive" else None),
    )
    ratio, error, _ = run.ratio(Z_GAUSSIAN)
    assert abs(ratio - 1) < 4 * error
    if mean is not None:
        assert run.weighted_mean()[0] == pytest.approx(mean, abs=0.015)


def test_the_adaptive_tilt_keeps_the_sample_size() -> None:
    filt = build("difference", "adaptive", 2, 8, 50.0, None)
    scores = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = filt.select(scores, call=0, progress=0.1)
    assert torch.allclose(chosen.ess, torch.tensor([5.6, 5.6], dtype=torch.float64), atol=1e-6)
    assert bool(((filt.share > 0) & (filt.share < 1)).all())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown potential 'maximum': choose one of difference"):
        potential("maximum", strength=1.0)
    with pytest.raises(ValueError, match="target_ess=1.5"):
        Difference(strength=1.0, target_ess=1.5)
