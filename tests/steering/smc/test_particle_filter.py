"""Bookkeeping of the filter: weights telescope, groups stay apart, the dead leave at once."""

import math
from typing import Any

import pytest
import torch

from diffplug.steering.smc.filter import ParticleFilter, count_distinct
from diffplug.steering.smc.potentials import Difference

pytestmark = pytest.mark.law


def build(groups: int = 1, particles: int = 4, strength: float = 1.0, **options: Any) -> ParticleFilter:
    """Return a filter with one stream per group, seeded 0, 1, 2 ..."""
    options.setdefault("generators", [torch.Generator().manual_seed(g) for g in range(groups)])
    tilt = options.pop("tilt", "constant")
    potential = Difference(strength=strength, tilt=tilt)
    return ParticleFilter(groups=groups, particles=particles, potential=potential, **options)


def rewards(groups: int, particles: int, calls: int, seed: int = 0) -> torch.Tensor:
    """Return random rewards `[calls, groups, particles]`."""
    return torch.randn(
        calls, groups, particles, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("tilt", ["constant", "rising"])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_log_potentials_of_a_lineage_sum_to_strength_times_reward(tilt: str, threshold: float | None) -> None:
    """Weights taken at selections plus the final weight give lambda * r of the finished picture, whatever
    happened.
    """
    filt = build(3, 5, strength=2.5, tilt=tilt, ess_threshold=threshold)
    spent = torch.zeros(3, 5, dtype=torch.float64)
    for call, scores in enumerate(rewards(3, 5, 6)):
        base = filt.base.clone()
        chosen = filt.select(scores, call=call, progress=(call + 1) / 7)
        factor = (call + 1) / 7 if tilt == "rising" else 1.0
        used = torch.where(chosen.resampled[:, None], 2.5 * factor * scores - base, 0.0)
        spent = (spent + used).gather(-1, chosen.ancestors)
    final = rewards(3, 5, 1, seed=9)[0]
    logw, _, _ = filt.finish(final)
    torch.testing.assert_close(spent + logw, 2.5 * final, rtol=0, atol=1e-9)


def test_without_a_selection_the_final_weight_forgets_the_way() -> None:
    filt = build(2, 4, strength=3.0, ess_threshold=1e-9)
    for call, scores in enumerate(rewards(2, 4, 3)):
        assert not filt.select(scores, call=call, progress=0.5).moves
    final = rewards(2, 4, 1, seed=5)[0]
    torch.testing.assert_close(filt.finish(final)[0], 3.0 * final)


def test_equal_rewards_never_select() -> None:
    filt = build(2, 4, strength=1e3)
    for call in range(3):
        chosen = filt.select(torch.full((8,), 0.37), call=call, progress=1.0)
        assert not chosen.moves
        assert not chosen.resampled.any()
    assert filt.log_z.tolist() == [0.0, 0.0]


def test_shift_and_scale_of_the_reward_leave_the_ancestors() -> None:
    scores = rewards(3, 6, 4)
    shift = torch.tensor([[5.0], [-3.0], [100.0]], dtype=torch.float64)

    def genealogy(strength: float, seen: torch.Tensor) -> list[list[list[int]]]:
        filt = build(3, 6, strength=strength)
        return [filt.select(r, call=i, progress=1.0).ancestors.tolist() for i, r in enumerate(seen)]

    plain = genealogy(2.0, scores)
    assert genealogy(2.0, scores + shift) == plain
    assert genealogy(0.5, 4.0 * scores) == plain
    assert genealogy(2.0, -scores) != plain


def test_groups_do_not_mix() -> None:
    scores = rewards(3, 5, 4)
    together = build(3, 5)
    alone = [build(1, 5, generators=[torch.Generator().manual_seed(g)]) for g in range(3)]
    for call, seen in enumerate(scores):
        chosen = together.select(seen, call=call, progress=1.0)
        for g, filt in enumerate(alone):
            single = filt.select(seen[g], call=call, progress=1.0)
            assert torch.equal(single.ancestors[0], chosen.ancestors[g])
    assert torch.equal(together.log_z, torch.cat([filt.log_z for filt in alone]))


def test_extreme_rewards_and_strengths_stay_finite() -> None:
    filt = build(1, 4, strength=1e3)
    filt.select(torch.tensor([1e3, -1e3, 999.0, 0.0]), call=0, progress=1.0)
    logw, log_z, _ = filt.finish(torch.tensor([1e3, 5.0, -1e3, 999.0]))
    assert torch.isfinite(logw).all()
    assert torch.isfinite(log_z).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_dead_are_replaced_at_once(bad: float) -> None:
    filt = build(2, 4, ess_threshold=0.5)
    seen = torch.tensor([[0.1, bad, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2]])
    chosen = filt.select(seen, call=0, progress=1.0)
    assert 1 not in chosen.ancestors[0].tolist()
    assert chosen.ancestors[1].tolist() == [0, 1, 2, 3]
    assert chosen.invalid == (0 if bad == -math.inf else 1)
    assert chosen.distinct_roots.tolist() == [3, 4]
    assert float(filt.log_z[0]) == pytest.approx(math.log(0.75) + 0.1)


def test_a_group_without_a_live_particle_counts_as_not_scored() -> None:
    filt = build(2, 3)
    seen = torch.tensor([[math.nan] * 3, [0.0, 5.0, 9.0]])
    chosen = filt.select(seen, call=0, progress=1.0)
    assert chosen.ancestors[0].tolist() == [0, 1, 2]
    assert chosen.resampled.tolist() == [False, True]
    assert filt.psi[0].tolist() == [0.0, 0.0, 0.0]


def test_one_particle_changes_nothing() -> None:
    filt = build(2, 1)
    assert not filt.select(torch.tensor([5.0, -7.0]), call=0, progress=1.0).moves
    assert filt.finish(torch.tensor([1.0, 2.0]))[1].tolist() == [1.0, 2.0]


def test_the_threshold_must_be_a_share() -> None:
    for bad in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(ValueError, match="ess_threshold"):
            build(ess_threshold=bad)


def test_distinct_values_are_counted_per_row() -> None:
    assert count_distinct(torch.tensor([[0, 0, 0], [2, 0, 1], [1, 1, 2]])).tolist() == [1, 3, 2]


@pytest.mark.parametrize("strength", [-1.0, math.inf, math.nan])
def test_strength_must_be_a_number_that_can_be_weighed(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        Difference(strength=strength)


def test_the_dead_stay_dead_at_strength_zero() -> None:
    assert Difference(strength=0.0).final(torch.tensor([1.0, -math.inf])).tolist() == [0.0, -math.inf]


@pytest.mark.law
def test_weights_are_the_published_ones_given_the_same_ancestors() -> None:
    """exp(strength (r_i - r_(i-1) of the parent)), every call resampled by independent draws."""
    generator = torch.Generator().manual_seed(4)
    filt = ParticleFilter(
        groups=3,
        particles=4,
        potential=Difference(strength=1.5, tilt="constant"),
        generators=[generator],
        resampler="multinomial",
    )
    parents = torch.zeros(3, 4, dtype=torch.float64)
    for call in range(5):
        rewards = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        chosen = filt.select(rewards, call=call, progress=1.0)
        published = (1.5 * (rewards - parents)).exp()
        assert torch.allclose(chosen.log_weights.exp(), published, rtol=2e-7)
        parents = rewards.gather(-1, chosen.ancestors)
