"""Resampling is unbiased, in range, and right at the numerical edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.steering import resample
from diffplug.steering.smc.resampling import RESAMPLERS, settle, uniforms

pytestmark = pytest.mark.law

LOG_WEIGHTS = st.lists(st.one_of(st.floats(-30, 30), st.just(-math.inf)), min_size=1, max_size=9).filter(
    lambda logw: any(math.isfinite(value) for value in logw)
)


def offspring(ancestors: torch.Tensor, k: int) -> torch.Tensor:
    """Return how often each particle was chosen, `[groups, k]`."""
    ones = torch.ones(ancestors.shape, dtype=torch.float64)
    return torch.zeros(len(ancestors), k, dtype=torch.float64).scatter_add(-1, ancestors, ones)


@pytest.mark.parametrize("scheme", RESAMPLERS)
@pytest.mark.parametrize("n", [4, 7])
def test_expected_offspring_is_n_times_weight(scheme: str, n: int) -> None:
    logw = torch.tensor([0.3, -1.0, 1.2, -math.inf, 0.0], dtype=torch.float64)
    groups = 20_000
    drawn = resample(logw.expand(groups, 5), torch.Generator().manual_seed(1), scheme, n)
    counts = offspring(drawn, 5)
    error = counts.std(0) / groups**0.5
    assert drawn.shape == (groups, n)
    assert bool(((counts.mean(0) - n * torch.softmax(logw, 0)).abs() <= 4 * error + 1e-9).all())


@pytest.mark.parametrize("scheme", RESAMPLERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(logw=LOG_WEIGHTS, n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_dead_particles_have_no_offspring(scheme: str, logw: list[float], n: int, seed: int) -> None:
    drawn = resample(torch.tensor(logw), torch.Generator().manual_seed(seed), scheme, n)
    assert drawn.shape == (n,)
    assert all(math.isfinite(logw[i]) for i in drawn.tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(logw=LOG_WEIGHTS, n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_copies_stay_next_to_their_expectation(logw: list[float], n: int, seed: int) -> None:
    expected = n * torch.softmax(torch.tensor(logw, dtype=torch.float64), 0)
    for scheme, below, above in (
        ("systematic", 1, 1),
        ("ssp", 1, 1),
        ("residual", 1, n),
        ("stratified", 2, 2),
    ):
        drawn = resample(torch.tensor(logw), torch.Generator().manual_seed(seed), scheme, n)
        counts = offspring(drawn[None], len(logw))[0]
        assert bool((counts > expected - below - 1e-9).all()), scheme
        assert bool((counts < expected + above + 1e-9).all()), scheme


@pytest.mark.parametrize("scheme", RESAMPLERS)
@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_extreme_uniforms_meet_zero_weights(scheme: str, u: float) -> None:
    logw = torch.tensor([[-math.inf, 0.0, 0.1, 0.2, -math.inf]], dtype=torch.float64)
    drawn = RESAMPLERS[scheme](logw, torch.full((1, 5), u, dtype=torch.float64))
    assert set(drawn[0].tolist()) <= {1, 2, 3}


def test_rounding_of_the_cumulative_sum_cannot_reach_a_dead_tail() -> None:
    logw = torch.cat([torch.full((10,), math.log(0.1)), torch.tensor([-math.inf])]).double()[None]
    drawn = RESAMPLERS["multinomial"](logw, torch.full((1, 1), 1.0 - 2.0**-53, dtype=torch.float64))
    assert drawn.tolist() == [[9]]


def test_jitter_on_equal_weights_loses_nobody_but_multinomial_does() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = {name: torch.arange(4).expand(4000, 4) for name in ("systematic", "ssp", "multinomial")}
    for _ in range(4):
        jitter = 1e-12 * torch.randn(4000, 4, dtype=torch.float64, generator=generator)
        roots = {name: old.gather(-1, resample(jitter, generator, name)) for name, old in roots.items()}
    kept = {name: (offspring(r, 4) > 0).sum(-1).double().mean().item() for name, r in roots.items()}
    assert kept["systematic"] >= 3.99
    assert kept["ssp"] >= 3.99
    assert kept["multinomial"] == pytest.approx(1.58, abs=0.05)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ancestors=st.integers(1, 8).flatmap(lambda k: st.lists(st.integers(0, k - 1), min_size=k, max_size=k)))
def test_settled_survivors_keep_their_slots(ancestors: list[int]) -> None:
    drawn = torch.tensor([ancestors, sorted(ancestors)])
    settled = settle(drawn)
    assert torch.equal(settled.sort(-1).values, drawn.sort(-1).values)
    for slot in set(ancestors):
        assert settled[0, slot] == slot


def test_a_group_draws_from_its_own_generator() -> None:
    def streams(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    logw = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    together = resample(logw, streams(5, 9), "multinomial")
    assert torch.equal(together[1], resample(logw[1], streams(9), "multinomial"))
    assert uniforms(streams(5), 3, 2).shape == (3, 2)
    with pytest.raises(ValueError, match="2 generators for 3 groups"):
        uniforms(streams(5, 9), 3, 2)


def test_bad_arguments_are_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="unknown resampler 'magic': choose one of systematic"):
        resample(torch.zeros(3), generator, "magic")
    with pytest.raises(ValueError, match="n must be at least 1"):
        resample(torch.zeros(3), generator, n=0)
