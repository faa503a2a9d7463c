"""Log weights stay finite, centred and unaffected by scale."""

import math

import pytest
import torch

from diffplug.steering import ess
from diffplug.steering.smc.weights import as_log_weights, log_mean_exp, normalised

pytestmark = pytest.mark.law


def test_ess_runs_from_one_to_k() -> None:
    equal, single = torch.full((8,), 3.0), torch.tensor([0.0, -torch.inf, -torch.inf])
    assert ess(equal) == pytest.approx(8.0)
    assert ess(single) == pytest.approx(1.0)
    assert ess(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])).tolist() == pytest.approx([2.0])


def test_huge_log_weights_do_not_overflow() -> None:
    logw = torch.tensor([1e6, 1e6 - 1.0, -1e6])
    weights = normalised(logw)
    assert weights.tolist() == pytest.approx([1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)), 0.0])
    assert 1.0 <= float(ess(logw)) <= 2.0
    assert float(log_mean_exp(logw)) == pytest.approx(1e6 + math.log((1 + math.exp(-1)) / 3))


def test_nan_counts_as_dead() -> None:
    assert normalised(torch.tensor([0.0, math.nan, 0.0])).tolist() == [0.5, 0.0, 0.5]


def test_shifting_a_group_changes_nothing() -> None:
    logw = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ess(logw), ess(logw + 700.0))
    torch.testing.assert_close(log_mean_exp(logw) + 700.0, log_mean_exp(logw + 700.0))


@pytest.mark.parametrize(
    ("logw", "word"),
    [
        (torch.tensor([math.inf, 0.0]), r"\+inf"),
        (torch.tensor([[0.0, 1.0], [-math.inf, math.nan]]), "weight zero"),
        (torch.tensor(1.0), "shape"),
        (torch.empty(2, 0), "shape"),
    ],
)
def test_weights_that_mean_nothing_are_refused(logw: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        as_log_weights(logw)
