"""The added schedulers: exact limits, marginals, and the laws that every sampler must hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    TCDScheduler,
)

from diffplug.noise.families import level, next_level
from diffplug.samplers.few_step import FlowMatchTCDScheduler, ListedDDIMScheduler
from diffplug.samplers.few_step.flow_tcd import renoised
from diffplug.samplers.few_step.grids import tcd, trailing
from diffplug.testing import check_sampler
from diffplug.transition import transition

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.tanh(1.3 * x + float(t) / 1000)


def sampled(scheduler: Any, timesteps: list[int], **step: Any) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in timesteps:
        x = scheduler.step(network(x, t), torch.tensor(t), x, **step).prev_sample
    return x


@pytest.mark.law
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_on_even_timesteps_it_is_ddim_and_tcd_without_noise_to_the_bit(steps: int, prediction: str) -> None:
    stock = DDIMScheduler(**SD, clip_sample=False, prediction_type=prediction)
    ours = ListedDDIMScheduler(**SD, clip_sample=False, prediction_type=prediction)
    other = TCDScheduler(**SD, prediction_type=prediction)
    stock.set_timesteps(steps)
    times = stock.timesteps.tolist()
    assert times == list(trailing(steps))
    ours.set_timesteps(timesteps=times)
    other.set_timesteps(timesteps=times)
    result = sampled(ours, times)
    assert torch.equal(result, sampled(stock, times))
    if prediction == "epsilon":
        assert torch.equal(result, sampled(other, times, eta=0.0))
    else:
        torch.testing.assert_close(result, sampled(other, times, eta=0.0))


@pytest.mark.law
@pytest.mark.parametrize("steps", [3, 6, 7, 9, 12])
def test_elsewhere_it_follows_the_list_which_stock_ddim_leaves(steps: int) -> None:
    stock = DDIMScheduler(**SD, clip_sample=False)
    ours, other = ListedDDIMScheduler(**SD, clip_sample=False), TCDScheduler(**SD)
    times = [int(t) for t in trailing(steps)]
    stock.set_timesteps(steps)
    assert stock.timesteps.tolist() == times
    ours.set_timesteps(timesteps=times)
    other.set_timesteps(timesteps=times)
    result = sampled(ours, times)
    assert torch.equal(result, sampled(other, times, eta=0.0))
    assert not torch.allclose(result, sampled(stock, times), atol=1e-3)


@pytest.mark.law
def test_its_jump_is_exact_for_a_constant_output() -> None:
    """J(J(x, t -> r), r -> s) = J(x, t -> s), and J(x, t -> t) = x up to rounding."""
    scheduler = ListedDDIMScheduler(**SD, clip_sample=False)
    x, eps = torch.randn(1, 4, 4, 4).double(), torch.randn(1, 4, 4, 4).double()

    def jump(x: torch.Tensor, times: list[int]) -> torch.Tensor:
        scheduler.set_timesteps(timesteps=times)
        for t in times[:-1]:
            x = scheduler.step(eps, t, x).prev_sample
        return x

    torch.testing.assert_close(jump(x, [900, 500, 100]), jump(x, [900, 100]), rtol=1e-5, atol=1e-5)


@pytest.mark.law
@pytest.mark.parametrize("steps", [3, 4, 7])
def test_x_stays_consistent_under_an_image_to_image_start(steps: int) -> None:
    whole, part = ListedDDIMScheduler(**SD, clip_sample=False), ListedDDIMScheduler(**SD, clip_sample=False)
    times = [int(t) for t in trailing(steps)]
    whole.set_timesteps(timesteps=times)
    part.set_timesteps(timesteps=times)
    part.set_begin_index(1)
    assert part.begin_index == 1 and part.step_index is None
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(sampled(part, times[1:]), sampled(whole, times[1:]))
    assert part.step_index == steps
    del x


@pytest.mark.law
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_noise_levels_are_kept_when_the_noise_is_true(eta: float) -> None:
    """Data-free: x0 = 0, so that the variance of every state is that of its level (both kinds of model)."""
    gen = torch.Generator().manual_seed(1)
    for scheduler, flow in ((ListedDDIMScheduler(**SD, clip_sample=False), False), (_flow(eta), True)):
        scheduler.set_timesteps(5)
        times = list(scheduler.timesteps)
        x = level(scheduler, times[0]).sigma * torch.randn(200_000, generator=gen)
        for t in times[:-1]:
            here, there = level(scheduler, t), next_level(scheduler, t)
            output = x / here.sigma  # eps, and v = eps - x0 alike
            options = {} if flow else {"eta": eta}
            x = scheduler.step(output, t, x, generator=gen, **options).prev_sample
            assert float(x.std()) == pytest.approx(there.sigma, rel=0.01)


def _flow(eta: float, **options: Any) -> FlowMatchTCDScheduler:
    return FlowMatchTCDScheduler(**{"shift": 3.0, **options}, eta=eta)


@pytest.mark.law
@pytest.mark.parametrize(
    ("eta", "other"), [(0.0, FlowMatchEulerDiscreteScheduler), (1.0, FlowMatchLCMScheduler)]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_flow_tcd_is_euler_and_lcm_in_its_limits(eta: float, other: Any, steps: int) -> None:
    pictures = []
    for scheduler in (_flow(eta), other(shift=3.0)):
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        gen = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=gen).prev_sample
        pictures.append(x)
    assert torch.equal(*pictures)


@pytest.mark.law
def test_the_deviation_of_flow_tcd_is_rho_for_every_eta() -> None:
    for rho in (0.999, 0.7, 0.3, 0.01):
        for eta in (0.0, 1e-6, 0.2, 0.5, 0.99, 1.0):
            lower, lift, noise = renoised(rho, eta)
            assert math.sqrt((lift * lower) ** 2 + noise**2) == pytest.approx(rho, rel=1e-12)
            assert lift * (1 - lower) == pytest.approx(1 - rho, rel=1e-9)


@pytest.mark.law
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_flow_tcds_transition_is_its_step(eta: float) -> None:
    scheduler = _flow(eta)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        output = network(x, t)
        step = transition(scheduler, output, t, x)
        gen = torch.Generator().manual_seed(3)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        x = scheduler.step(output, t, x, generator=gen).prev_sample
        torch.testing.assert_close(step.mean + step.std * noise, x, rtol=1e-5, atol=1e-5)


@pytest.mark.law
def test_the_grids_are_those_of_the_schedulers_they_are_named_after() -> None:
    for steps in range(1, 51):
        stock = TCDScheduler(**SD)
        stock.set_timesteps(steps)
        assert stock.timesteps.tolist() == list(tcd(steps))
        if steps <= 20:  # beyond, sums of float steps round the other way now and then
            ddim = DDIMScheduler(**SD)
            ddim.set_timesteps(steps)
            assert ddim.timesteps.tolist() == list(trailing(steps))
    assert len(tcd(80)) == 80


@pytest.mark.contract
@pytest.mark.parametrize("cls", [ListedDDIMScheduler, FlowMatchTCDScheduler])
def test_the_laws_of_samplers(cls: Any) -> None:
    check_sampler(cls)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ListedDDIMScheduler().set_timesteps(timesteps=[10, 20]), "have to fall"),
        (lambda: ListedDDIMScheduler().set_timesteps(timesteps=[1000, 20]), "from at most 999"),
        (lambda: ListedDDIMScheduler().set_timesteps(timesteps=[20.5]), "whole numbers"),
        (lambda: ListedDDIMScheduler().set_timesteps(timesteps=[]), "whole numbers"),
        (lambda: ListedDDIMScheduler().set_timesteps(3, timesteps=[20]), "leave one of them out"),
        (lambda: ListedDDIMScheduler().step(torch.ones(1), 3, torch.ones(1)), "call set_timesteps first"),
        (lambda: FlowMatchTCDScheduler(eta=1.1), r"eta is 1\.1"),
        (lambda: FlowMatchTCDScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_bad_input(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
