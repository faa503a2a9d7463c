"""The adaptive share keeps the sample size that was asked for, and no more tilt than that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.steering.smc.potentials import exponential, target_ess_share
from diffplug.steering.smc.weights import ess

pytestmark = pytest.mark.law


def share(
    full: torch.Tensor, target: float, base: torch.Tensor | None = None, start: float = 0.0
) -> torch.Tensor:
    """Return the share of one row or more of log potentials."""
    base = torch.zeros_like(full) if base is None else base
    return target_ess_share(full, base, torch.full((len(full),), start, dtype=torch.float64), target)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    full=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8),
    target=st.floats(0.05, 1.0),
)
def test_the_target_is_met_and_binds_unless_the_tilt_is_full(full: list[float], target: float) -> None:
    rows = torch.tensor([full], dtype=torch.float64)
    rho = share(rows, target)
    assert 0 <= float(rho) <= 1
    k = len(full)
    assert float(ess(rho[:, None] * rows)) >= target * k * (1 - 1e-6)
    if float(rho) < 1 - 1e-9 and target < 0.999:
        assert float(ess((rho[:, None] + 1e-3) * rows)) < target * k + 1e-2 * k


def test_mild_rewards_are_tilted_in_full_and_wild_ones_hardly() -> None:
    rows = torch.tensor([[0.1, 0.0, 0.05, 0.1], [1e3, 0.0, 5e2, -1e3]], dtype=torch.float64)
    rho = share(rows, 0.5)
    assert float(rho[0]) == 1.0
    assert 0 < float(rho[1]) < 1e-2


def test_the_share_never_falls() -> None:
    rows = torch.tensor([[9.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(share(rows, 0.9, start=0.4)) == 0.4


def test_the_dead_do_not_stop_the_tilt() -> None:
    rows = torch.tensor([[-torch.inf, 0.1, 0.1, 0.0], [-torch.inf] * 4], dtype=torch.float64)
    assert share(rows, 0.9).tolist() == [1.0, 0.0]


def test_das_rises_to_one() -> None:
    assert exponential(0, 0.1) == 0.0
    assert exponential(1, 0.1) == pytest.approx(0.1)
    assert exponential(100, 0.1) == 1.0
    with pytest.raises(ValueError, match="gamma=0"):
        exponential(3, 0.0)


@pytest.mark.parametrize("target", [0.0, -1.0, 1.5, float("nan")])
def test_targets_are_shares(target: float) -> None:
    with pytest.raises(ValueError, match="target_ess"):
        share(torch.zeros(1, 4, dtype=torch.float64), target)
