"""Transitions against the installed Diffusers; laws of log_prob, kl, normal form and ancestral step."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import diffusers
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffplug.noise.families import CLEAN, Level, level, levels, next_level, x0hat
from diffplug.transition import Transition, ancestral, coefficients, schedule_coefficients, transition

KINDS = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = SD | {"algorithm_type": "sde-dpmsolver++"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
OLD = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 1}

STEPS = [  # short class name, config, arguments of step
    *[
        ("DDIM", {"clip_sample": False, "prediction_type": k}, {"eta": e})
        for k in KINDS
        for e in (0.0, 0.4, 1.0)
    ],
    *[
        ("DDIM", {"prediction_type": k}, {"eta": 0.7, "use_clipped_model_output": u})
        for k in KINDS
        for u in (0, 1)
    ],
    ("DDIM", SD | {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, {"eta": 1.0}),
    ("DDIM", {"thresholding": True, "sample_max_value": 2.0}, {"eta": 1.0}),
    (
        "DDIM",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {},
    ),
    ("DDIMParallel", SD, {"eta": 0.5}),
    *[
        ("DDPM", {"variance_type": v, "prediction_type": k}, {})
        for v in ("fixed_small", "fixed_large")
        for k in KINDS
    ],
    (
        "DDPM",
        SD | {"variance_type": "fixed_small_log", "clip_sample": False, "timestep_spacing": "trailing"},
        {},
    ),
    *[("LCM", {"prediction_type": k, "clip_sample": c}, {}) for k in KINDS for c in (False, True)],
    ("LCM", {"timestep_scaling": 0.001}, {}),
    *[("TCD", {"prediction_type": k}, {"eta": e}) for k in KINDS for e in (0.0, 0.3, 1.0)],
    ("TCD", {}, {}),
    *[("EulerDiscrete", SD | {"prediction_type": k}, {}) for k in KINDS],
    *[("EulerAncestralDiscrete", SD | {"prediction_type": k}, {}) for k in KINDS[:2]],
    ("EulerAncestralDiscrete", SD | {"timestep_spacing": "trailing"}, {}),
    *[
        ("DPMSolverMultistep", SDE | {"solver_order": o, "prediction_type": k}, {})
        for o in (1, 2)
        for k in KINDS
    ],
    ("DPMSolverMultistep", SDE | {"solver_type": "heun"}, {}),
    ("DPMSolverMultistep", SDE | {"euler_at_final": True, "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistep", SDE | {"thresholding": True, "sample_max_value": 3.0}, {}),
    ("DPMSolverMultistep", SDE | FLOW, {}),
    ("DPMSolverMultistep", SD | OLD, {}),
    *[("DPMSolverMultistep", SD | {"solver_type": s}, {}) for s in ("midpoint", "heun")],
    *[("EDMDPMSolverMultistep", {"algorithm_type": a}, {}) for a in ("sde-dpmsolver++", "dpmsolver++")],
    ("EDMEuler", {}, {}),
    *[("FlowMatchEulerDiscrete", {"stochastic_sampling": s, "shift": 3.0}, {}) for s in (False, True)],
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, {}),
    ("FlowMatchLCM", {}, {}),
    *[("LTXEulerAncestralRF", {"eta": e, "s_noise": 0.9}, {}) for e in (0.0, 0.6, 1.0)],
]


def make(name: str, steps: int = 4, **config):
    """A scheduler by short name with its timesteps set."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded normal values."""
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def snapshot(scheduler) -> list:
    """What a scheduler holds, in an order and form that compares."""
    held = vars(scheduler).items()
    return [(k, v.tolist() if isinstance(v, torch.Tensor) else repr(v)) for k, v in held]


def close(ours, theirs, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to ``tolerance`` of the larger of 1 and their largest value."""
    return (ours - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.contract
@pytest.mark.parametrize(("name", "config", "kwargs"), STEPS, ids=str)
def test_mean_plus_noise_is_what_step_returns(name, config, kwargs):
    scheduler = make(name, **config)
    x = randn(2, 3, 6, 6) * level(scheduler, step_index=0).sigma
    forms = schedule_coefficients(scheduler, **kwargs)
    takes_noise = "generator" in scheduler.step.__code__.co_varnames
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input") and i % 2:
            scheduler.scale_model_input(x, t)
        output, before = randn(2, 3, 6, 6, seed=i + 1), snapshot(scheduler)
        ours = transition(scheduler, output, t, x, **kwargs)
        assert snapshot(scheduler) == before, "the scheduler was mutated"
        assert ours.form == forms[i], "the numbers need no network output"
        assert torch.equal(ours.x0, x0hat(scheduler, output, t, x))
        random = {"generator": seeded(i)} if takes_noise else {}
        x = scheduler.step(output, t, x, **random, **kwargs).prev_sample
        assert close(ours.sample(seeded(i)), x), f"step {i}"
    assert (
        ours.std == 0
        or (name, config.get("set_alpha_to_one")) == ("DDIM", False)
        or "sigma_min" in config.values()
    )


@pytest.mark.contract
@pytest.mark.parametrize("name", ["SCM", "CMStochasticIterative"])
def test_few_step_kernels_of_other_families(name):
    scheduler = make(name, 2)
    x, output = randn(2, 3, 4, 4) * level(scheduler, step_index=0).sigma, randn(2, 3, 4, 4, seed=1)
    for i in range(2):
        t = scheduler.timesteps[i]
        ours = transition(scheduler, output, t, x).sample(seeded(i))
        x = scheduler.step(output, t, x, generator=seeded(i)).prev_sample
        assert close(ours, x)


@pytest.mark.contract
def test_variance_noise_and_generator_lists_are_the_same_draws():
    scheduler = make("DDIM", clip_sample=False)
    x, output, noise, t = (
        randn(2, 3, 4, 4),
        randn(2, 3, 4, 4, seed=1),
        randn(2, 3, 4, 4, seed=2),
        scheduler.timesteps[1],
    )
    step = transition(scheduler, output, t, x, eta=1.0, generator=None, return_dict=False)
    theirs = scheduler.step(output, t, x, eta=1.0, variance_noise=noise).prev_sample
    assert close(step.sample(noise=noise), theirs)
    theirs = scheduler.step(output, t, x, eta=1.0, generator=[seeded(3), seeded(4)]).prev_sample
    assert close(step.sample([seeded(3), seeded(4)]), theirs)


@pytest.mark.contract
def test_a_step_by_index_is_the_step_of_a_run():
    scheduler = make("EulerAncestralDiscrete", **SD)
    twin, x, output = copy.deepcopy(scheduler), randn(1, 3, 4, 4) * 5, randn(1, 3, 4, 4, seed=1)
    scheduler._step_index = 3
    ours = transition(scheduler, output, None, x, step_index=1)
    theirs = transition(twin, output, twin.timesteps[1], x)
    assert ours.form == theirs.form and torch.equal(ours.mean, theirs.mean)


@pytest.mark.contract
def test_half_precision_runs_are_kept_in_float32():
    scheduler = make("FlowMatchEulerDiscrete", stochastic_sampling=True)
    x, output, t = randn(1, 4, 8).half(), randn(1, 4, 8, seed=1).half(), scheduler.timesteps[1]
    step, noise = transition(scheduler, output, t, x), randn(1, 4, 8, seed=2)
    assert step.mean.dtype == step.x0.dtype == torch.float32
    assert torch.equal(step.mean, transition(scheduler, output.float(), t, x.float()).mean)
    theirs = scheduler.step(output, t, x, generator=seeded(2)).prev_sample
    assert close(step.sample(noise=noise), theirs.float(), 1e-3)


# ------------------------------------------------------------------------------------------------------- laws


@pytest.mark.law
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_and_kl_are_those_of_normals(reduction):
    fold = getattr(torch, reduction)
    mean, other, x = (randn(3, 2, 4, seed=i, dtype=torch.float64) for i in range(3))
    a, b = Transition(mean, 0.3, mean), Transition(other, 0.5, other)
    p, q = Normal(mean, 0.3), Normal(other, 0.5)
    torch.testing.assert_close(
        a.log_prob(x, reduction), fold(p.log_prob(x).flatten(1), 1), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        a.kl(b, reduction), fold(kl_divergence(p, q).flatten(1), 1), rtol=1e-12, atol=0
    )
    assert a.log_prob(x.float()).dtype == torch.float64 and a.log_prob(x).shape == (3,)
    assert torch.equal(a.kl(a), torch.zeros(3, dtype=torch.float64))


@pytest.mark.law
def test_log_prob_has_the_gradient_of_the_score():
    mean = randn(2, 5).requires_grad_()
    x = randn(2, 5, seed=1)
    Transition(mean, 0.5, mean).log_prob(x, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / 0.25)


@pytest.mark.law
def test_samples_have_the_moments():
    draws = Transition(torch.full((40000, 1), 2.0), 0.5, torch.zeros(40000, 1)).sample(seeded())
    assert abs(draws.mean().item() - 2.0) < 0.01 and abs(draws.std().item() - 0.5) < 0.01


@pytest.mark.law
def test_kl_of_two_networks_is_the_weight_times_the_squared_gap():
    """KL per dimension = omega * mean squared difference of x0hat, for every one-step kernel."""
    for name, config, kwargs in STEPS:
        scheduler = make(
            name,
            **{k: v for k, v in config.items() if k != "thresholding"}
            | ({"clip_sample": False} if name in ("DDIM", "DDPM", "LCM", "DDIMParallel") else {}),
        )
        t, x = scheduler.timesteps[1], randn(2, 3, 6, 6, dtype=torch.float64)
        steps = [
            transition(scheduler, randn(2, 3, 6, 6, seed=s).double(), t, x, step_index=None, **kwargs)
            for s in (1, 2)
        ]
        if steps[0].std > 0:
            gap = (steps[0].x0 - steps[1].x0).square().flatten(1).mean(1)
            weight = steps[0].form.kl_weight
            torch.testing.assert_close(steps[0].kl(steps[1]), weight * gap, rtol=1e-6, atol=1e-12)


def rescaled(at: Level) -> float:
    """The factor that brings a state to variance-preserving scale."""
    return 1.0 / math.hypot(at.alpha, at.sigma)


@pytest.mark.law
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_ancestral_step_is_ddim(eta):
    scheduler = make("DDIM", 6, clip_sample=False, **SD)
    x, output, z = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    for t in scheduler.timesteps:
        x0 = x0hat(scheduler, output, t, x)
        ours = ancestral(x, x0, level(scheduler, t), next_level(scheduler, t), eta)
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        assert close(ours.sample(noise=z), theirs)


@pytest.mark.law
@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_the_ancestral_step_is_euler_ancestral_and_sde_dpm(name):
    scheduler = make(name, 6, **(SDE | {"solver_order": 1} if name.startswith("DPM") else SD))
    x, output = randn(2, 3, 4, 4) * level(scheduler, step_index=0).sigma, randn(2, 3, 4, 4, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        ours = ancestral(x, x0hat(scheduler, output, t, x), level(scheduler, t), next_level(scheduler, t))
        x = scheduler.step(output, t, x, generator=seeded(i)).prev_sample
        assert close(ours.sample(seeded(i)), x)


@pytest.mark.law
def test_the_ancestral_step_does_not_see_the_scale_of_x():
    """One transition written at other scales of x: rescaling the result gives the same mean and noise."""
    x0, eps = randn(1, 3, 4, dtype=torch.float64), randn(1, 3, 4, seed=1, dtype=torch.float64)
    results = []
    for scale_t, scale_s in ((1.0, 1.0), (3.7, 0.2), (1 / 1.4, 1 / 1.4)):
        here, there = Level(0.6 * scale_t, 0.8 * scale_t), Level(0.8 * scale_s, 0.6 * scale_s)
        step = ancestral(here.alpha * x0 + here.sigma * eps, x0, here, there, eta=0.8)
        results.append((step.mean * rescaled(there), torch.tensor(step.std * rescaled(there))))
    for mean, std in results[1:]:
        torch.testing.assert_close(mean, results[0][0])
        torch.testing.assert_close(std.double(), results[0][1].double())


@pytest.mark.law
def test_the_ancestral_step_at_both_ends():
    x, x0 = randn(1, 3), randn(1, 3, seed=1)
    first = ancestral(x, x0, Level(0.0, 1.0), Level(0.1, 0.9))
    assert first.form.b == 0 and first.std == pytest.approx(0.9)
    torch.testing.assert_close(first.mean, 0.1 * x0)
    last = ancestral(x, x0, Level(0.9, 0.1), CLEAN)
    assert last.std == 0 and torch.equal(last.mean, x0) and torch.equal(last.sample(), x0)


@pytest.mark.law
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_exact_steps_keep_the_marginal(eta):
    """From x ~ level t with the true x0 one ancestral step lands at level s: b sigma_t and s add up."""
    path = levels(make("DDPM", 10, **SD))
    for here, there in pairwise(path):
        form = ancestral(torch.zeros(1), torch.zeros(1), here, there, eta).form
        assert form.a + form.b * here.alpha == pytest.approx(there.alpha, abs=1e-12)
        assert math.hypot(form.b * here.sigma, form.s) == pytest.approx(there.sigma, abs=1e-12)


KL_TABLE = {  # transitions of the SD schedule -> KL weight in epsilon units: re-noising, ancestral
    (999, 749): (6.41, 5.91), (749, 499): (3.20, 2.70), (499, 249): (2.71, 2.21),
    (999, 874): (2.01, 1.51), (874, 749): (1.60, 1.10), (749, 624): (1.34, 0.84), (624, 499): (1.19, 0.69),
    (499, 374): (1.14, 0.64), (374, 249): (1.19, 0.69), (249, 124): (1.52, 1.02),
}  # fmt: skip


@pytest.mark.law
@pytest.mark.parametrize("steps", [4, 8])
def test_kl_weights_of_few_step_kernels_in_epsilon_units(steps):
    """omega sigma_t^2 / alpha_t^2 is half the SNR ratio, less 1/2 for ancestral noise (arXiv 2410.03190)."""
    grid = [k * (1000 // steps) - 1 for k in range(steps, 0, -1)]
    lcm, ddim = diffusers.LCMScheduler(**SD), make("DDIM", steps, timestep_spacing="trailing", **SD)
    lcm.set_timesteps(timesteps=grid)
    euler = make("EulerAncestralDiscrete", steps, timestep_spacing="trailing", **SD)
    assert ddim.timesteps.tolist() == euler.timesteps.tolist() == grid
    for i, pair in enumerate(pairwise(grid)):
        found = []
        for scheduler, kwargs in ((lcm, {}), (euler, {}), (ddim, {"eta": 1.0})):
            form = coefficients(scheduler, step_index=i, **kwargs)
            found.append(form.kl_weight / level(scheduler, step_index=i).snr)
        assert found[0] == pytest.approx(KL_TABLE[pair][0], abs=0.006)
        assert found[1] == pytest.approx(KL_TABLE[pair][1], abs=0.006)
        assert found[2] == pytest.approx(found[1], rel=1e-4)
        assert found[0] - found[1] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.law
def test_the_same_transition_has_one_log_probability_ratio_in_both_conventions():
    ddim, euler = (make(n, 4, timestep_spacing="trailing", **SD) for n in ("DDIM", "EulerAncestralDiscrete"))
    ddim.register_to_config(clip_sample=False)
    x, z = randn(2, 3, 4, 4, dtype=torch.float64), randn(2, 3, 4, 4, seed=9, dtype=torch.float64)
    outputs = [randn(2, 3, 4, 4, seed=s, dtype=torch.float64) for s in (1, 2)]
    ratios = []
    for scheduler, kwargs in ((ddim, {"eta": 1.0}), (euler, {})):
        state = x / level(scheduler, step_index=1).alpha * 1.0 if scheduler is ddim else x
        state = x * (level(ddim, step_index=1).alpha if scheduler is ddim else 1.0)
        policy, reference = (transition(scheduler, m, None, state, step_index=1, **kwargs) for m in outputs)
        landed = policy.sample(noise=z)
        ratios.append(policy.log_prob(landed) - reference.log_prob(landed))
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "config", "advice"),
    [
        ("DDIM", {}, "eta > 0 in scheduler.step"),
        ("FlowMatchEulerDiscrete", {}, "stochastic_sampling=True"),
        ("EulerDiscrete", SD, "EulerAncestralDiscreteScheduler"),
        ("DPMSolverMultistep", SD, "algorithm_type='sde-dpmsolver"),
        ("LTXEulerAncestralRF", {"eta": 0.0}, "eta > 0 in the scheduler's config"),
    ],
)
def test_a_deterministic_step_has_no_density(name, config, advice):
    scheduler = make(name, **config)
    step = transition(scheduler, randn(1, 2, 4), scheduler.timesteps[0], randn(1, 2, 4, seed=1))
    assert torch.equal(step.sample(), step.mean)
    with pytest.raises(ValueError, match=r"deterministic \(std = 0\).*" + advice.replace("(", r"\(")):
        step.log_prob(step.mean)
    with pytest.raises(ValueError, match="deterministic"):
        Transition(step.mean, 1.0, step.x0).kl(step)


@pytest.mark.contract
def test_bad_input_gets_a_sentence():
    x = randn(1, 2, 4)
    ddim, step = make("DDIM"), Transition(x, 1.0, x)
    for scheduler, kwargs, sentence in (
        (make("UniPCMultistep"), {}, "UniPCMultistepScheduler has no Gaussian transition"),
        (make("DDPM", variance_type="learned_range"), {}, "variance_type='learned_range'"),
        (make("TCD"), {"eta": 1.5}, "eta is 1.5, allowed is 0 to 1"),
        (ddim, {"eta": 1.5}, "lower eta"),
        (ddim, {"eta": -0.1}, "allowed is a number >= 0"),
        (ddim, {"gamma": 1}, "gamma=1 cannot be part of a DDIMScheduler transition: allowed are eta"),
        (make("EulerDiscrete"), {"s_churn": 2.0}, "s_churn=2.0 cannot be part"),
        (make("FlowMatchEulerDiscrete", invert_sigmas=True, stochastic_sampling=True), {}, "invert_sigmas"),
        (diffusers.DDIMScheduler(), {}, "call set_timesteps first"),
    ):
        with pytest.raises(ValueError, match=sentence):
            transition(scheduler, x, scheduler.timesteps[1], x, **kwargs)
    third = make("DPMSolverMultistep", 20, solver_order=3)
    with pytest.raises(ValueError, match=r"step 5 .* is of order 3"):
        coefficients(third, step_index=5)
    with pytest.raises(ValueError, match="step 2 needs earlier predictions"):
        transition(make("DPMSolverMultistep", **SDE), x, None, x, step_index=2)
    with pytest.raises(ValueError, match="reduction 'max'"):
        step.log_prob(x, "max")
    with pytest.raises(ValueError, match=r"noise has shape \(1, 2\)"):
        step.sample(noise=x[..., 0])
    with pytest.raises(ValueError, match="std is -1"):
        Transition(x, -1.0, x)
    with pytest.raises(ValueError, match="pass the less noisy level"):
        ancestral(x, x, Level(0.8, 0.6), Level(0.6, 0.8))
    with pytest.raises(ValueError, match="clean already"):
        ancestral(x, x, CLEAN, CLEAN)
    with pytest.raises(ValueError, match="they must be equal"):
        ancestral(x, x[:, :1], Level(0.6, 0.8), CLEAN)
    assert transition(make("EulerDiscrete"), x, make("EulerDiscrete").timesteps[1], x, s_churn=0.0).std == 0
