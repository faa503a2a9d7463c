"""DC-Solver on models with a known answer: order of convergence, special cases, what ratios win."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffplug.samplers import DCSolverScheduler
from diffplug.testing.closed_form.guided_mixture import GuidedMixture

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = (20, 40, 80, 160)
ALL_OFF = list(range(200))


def error(steps: int, **config: Any) -> float:
    """Of the final sample for data N(0.5, 0.3), on a grid that is even in log signal-to-noise; float64."""
    scheduler = DCSolverScheduler(**{**SD, "lower_order_final": False, "disable_corrector": [], **config})
    end = -math.log(float(((1 - scheduler.alphas_cumprod[0]) / scheduler.alphas_cumprod[0]) ** 0.5))
    scheduler.set_timesteps(sigmas=np.exp(-np.linspace(-2.5, end, steps + 1)[:-1]))
    scheduler.sigmas = scheduler.sigmas.double()
    alphas, sigmas = (level.tolist() for level in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas))
    spread = [(a * a * 0.3 + s * s) ** 0.5 for a, s in zip(alphas, sigmas, strict=True)]
    x = torch.tensor([[1.7], [-0.4]], dtype=torch.float64)
    exact = alphas[-1] * 0.5 + spread[-1] / spread[0] * (x - alphas[0] * 0.5)
    for i, t in enumerate(scheduler.timesteps):
        epsilon = sigmas[i] / spread[i] ** 2 * (x - alphas[i] * 0.5)
        x = scheduler.step(epsilon, t, x).prev_sample
    return float((x - exact).abs().max())


def slope(**config: Any) -> float:
    """Order of convergence: the slope of log error over log step."""
    ratio = config.pop("ratio", 1.0)

    def ratios(steps: int) -> list[float] | None:
        return None if ratio == 1 else [1.0, 1.0] + [ratio] * (steps - 2)

    errors = [error(steps, dc_ratios=ratios(steps), **config) for steps in STEPS]
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


@pytest.mark.law
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("solver_order", "disable_corrector", "order"),
    [(1, ALL_OFF, 1.0), (1, [], 2.0), (2, ALL_OFF, 2.0), (2, [], 3.0)],
    ids=["UniP-1", "UniPC-1", "UniP-2", "UniPC-2"],
)
def test_order_of_convergence(
    solver_order: int, disable_corrector: list[int], order: float, solver_type: str
) -> None:
    config = {"solver_order": solver_order, "solver_type": solver_type}
    assert slope(disable_corrector=disable_corrector, **config) == pytest.approx(order, abs=0.25)


@pytest.mark.law
def test_order_three_rises_towards_four() -> None:
    assert 3.4 < slope(solver_order=3) < 4.2


@pytest.mark.law
def test_a_constant_ratio_costs_the_order() -> None:
    """Compensation is for few steps: away from 1 it makes UniPC-2 a first-order method."""
    assert slope(ratio=1.1, dc_variable="lambda") == pytest.approx(1.0, abs=0.25)


def samples(scheduler: Any, steps: int = 8) -> torch.Tensor:
    toy = GuidedMixture(guidance_scale=2.0)
    return toy.sample(scheduler, steps, toy.pairs(8, seed=3))


@pytest.mark.law
def test_without_corrector_order_two_is_dpm_solver_plus_plus_2m() -> None:
    config = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "sigma_min"}
    theirs = samples(DPMSolverMultistepScheduler(**SD, **config))
    ours = samples(DCSolverScheduler(**SD, disable_corrector=ALL_OFF))
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=2e-5)


@pytest.mark.law
def test_without_corrector_order_one_is_ddim() -> None:
    """On a grid that both can walk: DDIM goes from t to t - 125, and ends at the first training timestep."""
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    ddim.set_timesteps(8)
    ours = DCSolverScheduler(**SD, disable_corrector=ALL_OFF, solver_order=1)
    ours.set_timesteps(timesteps=ddim.timesteps[:-1])  # their last step, from 0 to 0, changes nothing
    toy = GuidedMixture(guidance_scale=2.0)
    x, prompts = toy.pairs(8, seed=3)
    y = x
    for t in ours.timesteps:
        x = ours.step(toy.network(ours, x, t, prompts), t, x).prev_sample
        y = ddim.step(toy.network(ddim, y, t, prompts), int(t), y).prev_sample
    torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@pytest.mark.law
def test_searched_ratios_cut_the_error_on_fresh_samples() -> None:
    """Guidance 7.5, 6 steps: ratio by ratio from a coarse grid on 32 pairs, judged on 200 others."""
    toy, steps = GuidedMixture(), 6
    train, fresh = toy.pairs(32, seed=1), toy.pairs(200, seed=2)
    truth, fresh_truth = (toy.sample(DCSolverScheduler(**SD), 150, pairs) for pairs in (train, fresh))

    def squared_error(pairs: tuple[Tensor, Tensor], truth: Tensor, **config: Any) -> float:
        return float((toy.sample(DCSolverScheduler(**SD, **config), steps, pairs) - truth).square().mean())

    ratios = [1.0] * steps
    for i in range(2, steps):
        tries = [[*ratios[:i], tenths / 10, *ratios[i + 1 :]] for tenths in range(4, 19)]
        ratios = min(tries, key=lambda each: squared_error(train, truth, dc_ratios=each))
    neutral = squared_error(fresh, fresh_truth)
    assert squared_error(fresh, fresh_truth, dc_ratios=ratios) < 0.6 * neutral
    assert squared_error(fresh, fresh_truth, solver_order=3, disable_corrector=[]) > 2 * neutral
