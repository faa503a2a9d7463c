"""The losses of a search: what they count, and what they let go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_search import LINSPACE, mixture

from benchmarks.closed_form import ModelProblem
from diffplug.samplers.search.fits import coefficients, multistep
from diffplug.samplers.search.problem import SQUARED, Loss, check_loss, errors, loss_of

FINITE = st.floats(-1e3, 1e3)


@given(off=arrays(np.float64, (5, 3), elements=FINITE), scale=st.none() | st.floats(1e-3, 1e3))
def test_the_residuals_squares_sum_up_to_the_mean_loss(off: np.ndarray, scale: float | None) -> None:
    loss = Loss(scale)
    of_pairs = np.square(off).mean(axis=1)
    assert np.square(loss.residuals(off)).sum() == pytest.approx(loss(of_pairs).mean(), rel=1e-9, abs=1e-12)


@given(of_pairs=arrays(np.float64, 6, elements=st.floats(0, 1e6)), scale=st.floats(1e-3, 1e3))
def test_the_robust_loss_is_below_the_squared_one_and_keeps_the_order(
    of_pairs: np.ndarray, scale: float
) -> None:
    robust = Loss(scale)(of_pairs)
    assert (robust <= of_pairs * (1 + 1e-12) + np.finfo(np.float64).tiny).all()  # below it, digits are few
    order = np.argsort(of_pairs)
    assert (np.diff(robust[order]) >= 0).all()


def test_small_errors_count_in_full_and_endless_ones_stay_endless() -> None:
    loss = Loss(2.0)
    assert loss(np.array([1e-6]))[0] == pytest.approx(1e-6, rel=1e-6)
    assert loss(np.array([np.inf]))[0] == np.inf
    assert SQUARED(np.array([3.0]))[0] == 3.0


def test_the_robust_scale_follows_the_spread_of_converged_samples() -> None:
    problem = mixture(8, seed=5, fine=60)
    assert loss_of("squared", problem) is SQUARED
    found = loss_of("robust", problem).scale
    assert found == pytest.approx(0.1 * problem.reference.var(axis=0).mean())


def test_one_pair_has_no_spread_and_names_are_checked() -> None:
    with pytest.raises(ValueError, match="robust.*1 converged samples.*more prompts"):
        loss_of("robust", mixture(1, seed=5, fine=20))
    with pytest.raises(ValueError, match="unknown loss 'robsut'. Did you mean 'robust'"):
        check_loss("robsut")


def test_a_pair_that_cannot_be_had_does_not_move_a_robust_fit() -> None:
    """The truth of one pair of twelve is put elsewhere: the others fare better with the robust loss."""
    clean, spoilt = mixture(12, seed=1, fine=60), mixture(12, seed=1, fine=60)
    spoilt.__dict__["reference"] = clean.reference + 8.0 * (np.arange(12) == 0)[:, None]
    start = multistep(4, LINSPACE)[0]

    def of_the_others(problem: ModelProblem) -> float:
        found = coefficients(problem, start, iterations=4)
        return float(errors(clean, found).of_pairs[1:].mean())

    squared = of_the_others(spoilt)
    spoilt.loss = loss_of("robust", clean)
    robust = of_the_others(spoilt)
    assert robust < 0.5 * squared
    assert robust < errors(clean, start).of_pairs[1:].mean()
