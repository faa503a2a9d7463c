"""Kernels against torch.distributions and the installed Diffusers, and the identities of omega."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffplug import noise
from diffplug.testing.families import SD_BETAS
from diffplug.training.noise_path import NoisePath
from diffplug.training.preference.kernel import Kernel

VP = NoisePath.of(DDIMScheduler(**SD_BETAS))
FLOW = NoisePath.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
TRAILING = {"timestep_spacing": "trailing"}


def scheduler(name: str, steps: int = 4, **config: Any) -> Any:
    made = getattr(diffusers, name)(**config)
    if name in ("LCMScheduler", "TCDScheduler"):
        made.set_timesteps(timesteps=[999, 749, 499, 249])
    else:
        made.set_timesteps(steps)
    return made


KERNELS = {
    "lcm": lambda: Kernel.of(scheduler("LCMScheduler", **SD_BETAS, clip_sample=False), VP),
    "tcd": lambda: Kernel.of(scheduler("TCDScheduler", **SD_BETAS, clip_sample=False), VP, eta=0.3),
    "euler-a": lambda: Kernel.of(scheduler("EulerAncestralDiscreteScheduler", **SD_BETAS, **TRAILING), VP),
    "ddim-class": lambda: Kernel.of(
        scheduler("DDIMScheduler", **SD_BETAS, **TRAILING, clip_sample=False), VP, eta=1.0
    ),
    "ddim": lambda: Kernel.ddim(VP, 4, 1.0),
    "renoise": lambda: Kernel.renoise(VP, 4),
    "flow-ddim": lambda: Kernel.ddim(FLOW, 4, 0.7),
    "flow-renoise": lambda: Kernel.renoise(FLOW, 4),
    "flow-sde": lambda: Kernel.flow_sde(FLOW, 4),
    "flow-lcm": lambda: Kernel.of(scheduler("FlowMatchLCMScheduler", shift=3.0), FLOW),
    "flow-euler": lambda: Kernel.of(
        scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, stochastic_sampling=True), FLOW
    ),
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.law
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_density_is_that_of_a_normal(kernel: Kernel, reduction: Any) -> None:
    steps = torch.tensor(kernel.trainable)
    x, x0, x_next, ref = normal(4, len(steps), 3, 2, 2)
    found = kernel.log_prob(x, x0, x_next, steps, reduction)
    for row, step in enumerate(steps.tolist()):
        form = kernel.forms[step]
        told = torch.distributions.Normal(form.a * x0[row] + form.b * x[row], form.s).log_prob(x_next[row])
        expected = told.mean() if reduction == "mean" else told.sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-6)
    ratio = kernel.log_ratio(x, x0, ref, x_next, steps, reduction)
    gap = found - kernel.log_prob(x, ref, x_next, steps, reduction)
    assert torch.allclose(ratio, gap, rtol=1e-6, atol=1e-9)
    expected = kernel.log_ratio(x, x0, ref, kernel.mean(x, x0, steps), steps, reduction)
    assert torch.allclose(kernel.kl(x0, ref, steps, reduction), expected, rtol=1e-6)


@pytest.mark.law
@pytest.mark.parametrize("name", ["lcm", "tcd", "euler-a", "ddim-class", "flow-lcm", "flow-euler"])
def test_a_sample_is_what_the_scheduler_steps_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS[name]()
    classes = {
        "lcm": ("LCMScheduler", {**SD_BETAS, "clip_sample": False}),
        "tcd": ("TCDScheduler", {**SD_BETAS, "clip_sample": False}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {**SD_BETAS, **TRAILING}),
        "ddim-class": ("DDIMScheduler", {**SD_BETAS, **TRAILING, "clip_sample": False}),
        "flow-lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
        "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    }
    made = scheduler(classes[name][0], **classes[name][1])
    path = FLOW if "flow" in name else VP
    x = normal(2, 4, 4, 4).float() * kernel.start
    extra = {"ddim-class": {"eta": 1.0}, "tcd": {"eta": 0.3}}.get(name, {})
    for i, t in enumerate(made.timesteps):
        output, z = normal(2, 4, 4, 4, seed=i + 1).float(), normal(2, 4, 4, 4, seed=i + 9).float()
        monkeypatch.setattr(torch, "randn_like", lambda *a, z=z, **k: z)
        for place in (diffusers.schedulers, *_modules()):
            monkeypatch.setattr(place, "randn_tensor", lambda *a, z=z, **k: z, raising=False)
        x0 = noise.x0hat(made, output, t, x)
        told = x / kernel.scale[i].float()
        step = torch.tensor([i, i])
        ours = path.predict(output, told, kernel.index[step]).x0
        assert torch.allclose(ours, x0, rtol=1e-4, atol=1e-4)
        assert kernel.stochastic(i) == (i < len(kernel) - 1)
        after = made.step(output, t, x, **extra).prev_sample
        assert torch.allclose(
            kernel.sample(x, x0, step, z), after, rtol=1e-5, atol=1e-5 * float(x.abs().max())
        )
        x = after
    with pytest.raises(ValueError, match="deterministic, it has no density"):
        kernel.log_prob(x, x, x, torch.tensor([3, 3]))


def _modules() -> list[Any]:
    import sys

    return [m for n, m in sys.modules.items() if n.startswith("diffusers.schedulers.scheduling_")]


@pytest.mark.law
def test_the_identities_of_omega() -> None:
    index = torch.tensor([1000.0, 750, 500, 250])
    alpha, sigma = VP.levels(index)
    snr = (alpha / sigma).square()
    three = torch.tensor([0, 1, 2])
    renoise, ancestral = KERNELS["lcm"]().omega(three), KERNELS["euler-a"]().omega(three)
    assert torch.allclose(renoise, snr[1:] / 2, rtol=1e-5)
    assert torch.allclose(ancestral, (snr[1:] - snr[:-1]) / 2, rtol=1e-4)
    assert torch.allclose(KERNELS["ddim"]().omega(three), (snr[1:] - snr[:-1]) / 2, rtol=1e-9)
    in_eps = [round(float(v), 2) for v in renoise / snr[:-1]]
    assert in_eps == [6.41, 3.20, 2.71]
    assert [round(float(v), 2) for v in ancestral / snr[:-1]] == [5.91, 2.70, 2.21]


@pytest.mark.law
def test_one_transition_in_two_conventions_has_one_log_ratio() -> None:
    euler, ddim = KERNELS["euler-a"](), KERNELS["ddim"]()
    x, x0, ref, z = normal(4, 3, 2, 2)
    steps = torch.tensor([0, 1, 2])
    alpha = VP.levels(ddim.index)[0]
    here, there = (alpha[i].view(3, 1, 1) for i in (steps, steps + 1))
    following = ddim.sample(x, x0, steps, z)
    one = ddim.log_ratio(x, x0, ref, following, steps)
    other = euler.log_ratio(x / here, x0, ref, following / there, steps)
    assert torch.allclose(one, other, rtol=1e-4)


@pytest.mark.law
def test_the_std_of_ddim_with_twenty_steps() -> None:
    made = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    made.set_timesteps(20)
    kernel = Kernel.of(made, VP, eta=1.0)
    told = [.6444, .6241, .6029, .5807, .5576, .5336, .5087, .4829, .4565, .4293, .4016, .3732, .3442, .3144,
            .2836, .2509, .2144, .1673, .0406, .0206]  # fmt: skip
    assert [form.s for form in kernel.forms] == pytest.approx(told, abs=1e-4)
    assert kernel.trainable == list(range(20))


def test_steps_that_are_nearly_deterministic_are_left_out() -> None:
    made = diffusers.FlowMatchLCMScheduler()
    made.set_timesteps(sigmas=[1.0, 0.667, 0.334, 0.001])
    kernel = Kernel.of(made, NoisePath.of(made))
    assert kernel.trainable == [0, 1]


def test_what_has_no_gaussian_step_is_refused() -> None:
    made = diffusers.DPMSolverMultistepScheduler(**SD_BETAS, algorithm_type="sde-dpmsolver++")
    made.set_timesteps(4)
    with pytest.raises(ValueError, match="solver_order=1"):
        Kernel.of(made, VP)
    with pytest.raises(ValueError, match="flow-sde is for flow models"):
        Kernel.flow_sde(VP, 4)
