"""The jump: exact in float64, the same for every kind of prediction, the stock scheduler's own step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffplug.testing.families import SD_BETAS
from diffplug.training.noise_path import NoisePath, Prediction, edges
from diffplug.training.objectives.segmented_consistency import edge_below


def ddim(**config: object) -> DDIMScheduler:
    plain = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    return DDIMScheduler(**{**SD_BETAS, **plain, **config})


VP = NoisePath.of(ddim())
FLOW = NoisePath(None, "flow_prediction", shift=3.0)


def outputs(
    path: NoisePath, x: torch.Tensor, index: torch.Tensor, eps: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The outputs of every kind of network that means this eps."""
    alpha, sigma = (v.view(-1, 1) for v in path.levels(index))
    x0 = (x - sigma * eps) / alpha
    if path.flow:
        return {"flow_prediction": eps - x0}
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}


@pytest.mark.law
@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_jumps_stay_compose_and_agree_between_kinds_of_prediction(path: NoisePath) -> None:
    x, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r, s = (
        torch.tensor(index).double()
        for index in ([900, 700, 400, 80, 999], [600, 690, 10, 79, 5], [0, 3, 9, 0, 1])
    )
    for kind, output in outputs(path, x, t, eps).items():
        same = NoisePath(path.abar, kind, shift=path.shift)
        said = same.predict(output, x, t)
        assert torch.allclose(same.jump(said, t), x, atol=1e-10)
        assert torch.allclose(said.eps, eps, atol=1e-10)
        middle = same.jump(said, r)
        again = same.predict(outputs(path, middle, r, eps)[kind], middle, r)
        assert torch.allclose(same.jump(again, s), same.jump(said, s), atol=1e-9)


@pytest.mark.law
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_the_jump_between_edges_is_a_step_of_ddim_with_trailing_spacing(kind: str, n: int) -> None:
    scheduler = ddim(prediction_type=kind)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(n)
    path, edge = NoisePath.of(scheduler), torch.tensor(edges(VP, n)[::-1]).double()
    assert path.timesteps(edge[:-1]).tolist() == scheduler.timesteps.tolist()
    for j, t in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 1, 4, dtype=torch.float64)
        stock = scheduler.step(output, t, x).prev_sample
        own = path.jump(path.predict(output, x, edge[j : j + 1]), edge[j + 1 : j + 2])
        assert torch.allclose(own, stock, atol=1e-8)


@pytest.mark.law
def test_the_jump_of_a_flow_is_an_euler_step_on_unshifted_edges() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    path = NoisePath.of(scheduler)
    edge = torch.tensor(edges(path, 4)[::-1]).double()
    assert torch.allclose(path.levels(edge)[1], scheduler.sigmas.double(), atol=1e-6)
    assert torch.allclose(path.timesteps(edge[:-1]), scheduler.timesteps.double(), atol=1e-3)
    x, output = torch.randn(2, 1, 4)
    for j, t in enumerate(scheduler.timesteps):
        stock = scheduler.step(output, t, x).prev_sample
        assert torch.allclose(
            path.jump(path.predict(output, x, edge[j : j + 1]), edge[j + 1 : j + 2]), stock, atol=1e-5
        )


@pytest.mark.law
def test_levels_lead_back_to_their_index_in_any_scale() -> None:
    for index in (0, 1, 250, 750, 1000):
        alpha, sigma = (float(v) for v in VP.levels(torch.tensor([index])))
        assert VP.index_of(alpha, sigma) == index
        assert VP.index_of(1.0, sigma / alpha) == index  # Euler's states
        a, s = (float(v) for v in FLOW.levels(torch.tensor([index])))
        assert math.isclose(FLOW.index_of(a, s), index, abs_tol=1e-6)
    x = torch.randn(3)
    assert torch.allclose(VP.standard(x * 5, 5 * 0.6, 5 * 0.8), x)


@pytest.mark.law
@pytest.mark.parametrize("k", [1, 2, 4, 5, 8])
def test_the_edge_lies_strictly_below_and_the_solver_stays_in_its_segment(k: int) -> None:
    edge, t = torch.tensor(edges(VP, k)), torch.arange(1, 1001)
    below = edge_below(t, 1000 // k)
    assert bool((below < t).all()) and bool(torch.isin(below, edge).all())
    assert torch.equal(edge_below(edge[1:], 1000 // k), edge[:-1])
    stride = 20
    after = torch.maximum(t - stride, below)
    assert bool((after >= below).all()) and bool((after < t).all())


@pytest.mark.law
def test_noise_that_is_added_keeps_the_marginal() -> None:
    """Var x_t = sigma_t^2 for data 0, whatever was in between."""
    generator = torch.Generator().manual_seed(0)
    eps, fresh = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    for path in (VP, FLOW):
        low, high = torch.tensor([250.0]), torch.tensor([700.0])
        x = path.jump(Prediction(torch.zeros_like(eps), eps), low)
        up = path.noised(x, fresh, low, high)
        assert math.isclose(float(up.var()), float(path.levels(high)[1]) ** 2, rel_tol=0.01)


@pytest.mark.law
def test_the_residual_of_the_exact_map_falls_with_the_square_of_the_solvers_step() -> None:
    """Gaussian data N(0, v): phi(t, s) is linear; one DDIM step of t -> t' misses it by O(delta^2)."""
    v, t, s = 0.25, 701.0, 101.0

    def phi(start: float, end: float) -> float:
        (a, b), (c, d) = (VP.levels(torch.tensor([i])) for i in (start, end))
        return float(((c**2 * v + d**2) / (a**2 * v + b**2)).sqrt())

    residuals = []
    for delta in (200, 100, 50, 25):
        x, index = torch.ones(1, 1, dtype=torch.float64), torch.tensor([t])
        alpha, sigma = VP.levels(index)
        eps = sigma * x / (alpha**2 * v + sigma**2)
        stepped = float(VP.jump(VP.predict(eps, x, index), index - delta))
        residuals.append(abs(phi(t, s) - phi(t - delta, s) * stepped))
    assert residuals == pytest.approx([6.7e-3, 1.31e-3, 2.9e-4, 6.8e-5], rel=0.05)
    assert all(a / b > 4 for a, b in pairwise(residuals))


def test_steps_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 steps do not divide the 1000 timesteps.*1, 2, 4, 5, 8"):
        edges(VP, 3)


def test_a_level_between_timesteps_is_refused_and_so_is_an_unknown_schedule() -> None:
    for i in (1, 500, 999):
        alpha, sigma = (float(v.mean()) for v in VP.levels(torch.tensor([i, i + 1])))
        with pytest.raises(ValueError, match="between the timesteps of training"):
            VP.index_of(alpha, sigma)
    assert NoisePath.of(EulerDiscreteScheduler(**SD_BETAS)).prediction == "epsilon"
