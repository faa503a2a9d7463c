"""x0hat and levels against the installed Diffusers: every family, prediction type and step of a run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import diffusers
import pytest
import torch

from diffplug.noise.families import CLEAN, KNOWN, Level, family, level, levels, next_level, step_count, x0hat
from diffplug.noise.position import find, host, step_index
from diffplug.noise.prediction import threshold

KINDS = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
SIGMAS = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")


def make(name: str, steps: int = 5, **config):
    """A scheduler by short name with its timesteps set."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def state(scheduler) -> dict:
    """A deep copy of everything a scheduler holds."""
    return copy.deepcopy(dict(vars(scheduler)))


def same(a, b) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or not isinstance(a, (int, float, str)))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to ``tolerance`` of the larger of 1 and their largest value."""
    return (ours - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


def reported(scheduler, output, t, x):
    """What the scheduler itself computes as clean prediction: its second return value or converted output."""
    twin = copy.deepcopy(scheduler)
    if hasattr(twin, "convert_model_output"):
        twin._step_index = twin.step_index if twin.step_index is not None else twin.index_for_timestep(t)
        return twin.convert_model_output(output, sample=x)
    return twin.step(output, t, x, return_dict=False)[1]


PREDICTING = [
    *[(n, SD | {"prediction_type": k}) for n in ("DDIM", "DDPM", "CogVideoXDDIM") for k in KINDS],
    *[(n, SD | {"prediction_type": k, "clip_sample": False}) for n in ("DDIM", "DDPM") for k in KINDS],
    *[(n, {"thresholding": True, "sample_max_value": 1.5}) for n in ("DDIM", "DDPM", "UniPCMultistep")],
    *[(n, SD | {"prediction_type": k}) for n in SIGMAS for k in KINDS[:2]],
    *[(n, SD | {"prediction_type": "sample"}) for n in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete")],
    ("HeunDiscrete", {"clip_sample": True}),
    ("EulerDiscrete", SD | {"use_karras_sigmas": True}),
    *[(n, SD | {"num_train_timesteps": 100}) for n in ("KDPM2Discrete", "KDPM2AncestralDiscrete")],
    *[(n, SD | {"prediction_type": k}) for n in SOLVERS if n != "DEISMultistep" for k in KINDS],
    *[(n, FLOW) for n in SOLVERS if n != "DEISMultistep"],
    ("DPMSolverMultistep", {"thresholding": True}),
    *[(n, {"prediction_type": k}) for n in ("EDMEuler", "EDMDPMSolverMultistep") for k in KINDS[:2]],
    ("EDMDPMSolverMultistep", {"thresholding": True}),
    ("CosineDPMSolverMultistep", {}),
]


@pytest.mark.contract
@pytest.mark.parametrize(("name", "config"), PREDICTING, ids=str)
def test_x0hat_is_what_the_scheduler_computes(name, config):
    scheduler = make(name, **config)
    x = randn(2, 3, 8, 8) * level(scheduler, step_index=0).sigma
    for i, t in enumerate(scheduler.timesteps):
        output, before = randn(2, 3, 8, 8, seed=i + 1), state(scheduler)
        ours = x0hat(scheduler, output, t, x)
        assert same(before, vars(scheduler)), "the scheduler was mutated"
        assert ours.dtype == torch.float32
        assert close(ours, reported(scheduler, output, t, x))
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        if name != "CosineDPMSolverMultistep" or i < len(scheduler.timesteps) - 1:
            x = scheduler.step(output, t, x, return_dict=False)[0]


def output_for(scheduler, kind, at: Level, x0, eps):
    """The network output that says exactly (x0, eps) in a scheduler's parametrisation."""
    if family(scheduler).name == "flow":
        return x0 - eps if scheduler.config.get("invert_sigmas") else eps - x0
    norm = math.hypot(at.alpha, at.sigma)
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (at.alpha * eps - at.sigma * x0) / norm,
        "flow_prediction": eps - x0,
    }[kind]


KNOWING = [
    *[(n, SD | {"prediction_type": k}) for n in ("PNDM", "LCM", "TCD", *SOLVERS) for k in KINDS],
    *[(n, SD | {"prediction_type": k}) for n in SIGMAS for k in KINDS[:2]],
    *[("DPMSolverSDE", SD | {"prediction_type": k}) for k in KINDS[:2]],
    *[(f"KDPM2{a}Discrete", SD | {"num_train_timesteps": 100}) for a in ("", "Ancestral")],
    *[(n, FLOW) for n in SOLVERS],
    *[
        (n, {})
        for n in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
    ],
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    ("UnCLIP", {"clip_sample": False}),
    ("IPNDM", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", SD | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", SD | {"predict_x0": False, "solver_order": 1}),
]


@pytest.mark.law
@pytest.mark.parametrize(("name", "config"), KNOWING, ids=str)
def test_a_network_that_knows_x0_is_understood_at_every_level(name, config):
    kind = config.get("prediction_type", "epsilon")
    config = {k: v for k, v in config.items() if name != "IPNDM"}
    scheduler = make(name, **config)
    x0, eps = randn(2, 3, 4, 4, dtype=torch.float64), randn(2, 3, 4, 4, seed=1, dtype=torch.float64)
    for i in range(step_count(scheduler)):
        at = level(scheduler, step_index=i)
        x = at.alpha * x0 + at.sigma * eps
        if at.alpha == 0 and kind == "epsilon" and name == "UnCLIP":
            continue
        ours = x0hat(scheduler, output_for(scheduler, kind, at, x0, eps), None, x, step_index=i)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, x0, rtol=0, atol=1e-9)


RUNS = [
    ("PNDM", SD | {"skip_prk_steps": True}),
    ("PNDM", SD),
    ("HeunDiscrete", SD),
    ("KDPM2Discrete", SD | {"num_train_timesteps": 100}),
    ("FlowMatchHeunDiscrete", {}),
    ("DEISMultistep", SD),
]


@pytest.mark.law
@pytest.mark.parametrize(("name", "config"), RUNS, ids=str)
def test_levels_hold_along_a_run_of_an_exact_network(name, config):
    """With a network that knows x0, ODE solvers keep x = alpha x0 + sigma eps on every call."""
    scheduler, x0, eps = make(name, 20, **config), randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1)
    at = level(scheduler, scheduler.timesteps[0])
    x = at.alpha * x0 + at.sigma * eps
    for t in scheduler.timesteps:
        at, there = level(scheduler, t), next_level(scheduler, t)
        output = output_for(scheduler, "epsilon", at, x0, eps)
        assert close(x, at.alpha * x0 + at.sigma * eps, 2e-4)
        assert close(x0hat(scheduler, output, t, x), x0, 5e-3)
        scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
        x = scheduler.step(output, t, x).prev_sample
        assert close(x, there.alpha * x0 + there.sigma * eps, 2e-4)


@pytest.mark.contract
def test_angles_and_jumps():
    for name, kwargs in (("SCM", {}), ("CMStochasticIterative", {"clip_denoised": True})):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**kwargs)
        scheduler.set_timesteps(2)
        x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
        ours = x0hat(scheduler, output, scheduler.timesteps[0], x)
        twin = copy.deepcopy(scheduler)
        if name == "SCM":
            theirs = twin.step(output, twin.timesteps[0], x, return_dict=False)[1]
        else:
            skip, out = twin.get_scalings_for_boundary_condition(twin.sigmas[0])
            theirs = (out * output + skip * x).clamp(-1, 1)
        assert close(ours, theirs)
    assert len(levels(scheduler)) == 3


@pytest.mark.contract
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("begin", [None, 2])
def test_the_step_index_is_the_schedulers_own(begin, as_float):
    for name in ("EulerDiscrete", "FlowMatchEulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "LCM"):
        scheduler = make(name, 6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        t = scheduler.timesteps[3]
        value = float(t) if as_float else t
        twin = copy.deepcopy(scheduler)
        twin._init_step_index(t)
        assert step_index(scheduler, value) == twin.step_index
        scheduler._step_index = 4
        assert step_index(scheduler, value) == 4
        scheduler._step_index = len(scheduler.timesteps)
        assert step_index(scheduler, value) == find(scheduler, value)


@pytest.mark.contract
def test_half_precision_and_learned_variance():
    scheduler = make("DDIM", clip_sample=False, **SD)
    x, output, t = randn(2, 3, 4, 4).half(), randn(2, 6, 4, 4, seed=1).half(), scheduler.timesteps[1]
    ours = x0hat(scheduler, output, t, x)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, x0hat(scheduler, output[:, :3].float(), t, x.float()))
    learned = make("DDPM", variance_type="learned_range")
    theirs = copy.deepcopy(learned).step(output.float(), learned.timesteps[1], x.float()).pred_original_sample
    assert close(x0hat(learned, output, learned.timesteps[1], x), theirs)


@pytest.mark.contract
def test_x0hat_is_differentiable_and_keeps_integer_timesteps():
    scheduler = make("EulerDiscrete", **SD)
    output = randn(1, 2, 4, 4).requires_grad_()
    x0hat(scheduler, output, scheduler.timesteps[2], randn(1, 2, 4, 4)).sum().backward()
    sigma = level(scheduler, scheduler.timesteps[2]).sigma
    torch.testing.assert_close(output.grad, torch.full_like(output, -sigma))
    table = make("DDIM")
    assert level(table, 500) == level(table, torch.tensor(500)) == level(table, torch.tensor([500]))


@pytest.mark.law
def test_levels_end_clean_and_fall_in_noise():
    for name in ("DDIM", "DDPM", "LCM", "EulerAncestralDiscrete", "UniPCMultistep", "FlowMatchEulerDiscrete"):
        path = levels(make(name, 8))
        assert path[-1] == CLEAN, name
        assert all(a.snr < b.snr for a, b in pairwise(path)), name
    assert levels(make("FlowMatchEulerDiscrete", 8, invert_sigmas=True))[-1] == CLEAN
    assert Level(0.6, 0.8).snr == pytest.approx(0.5625)
    assert Level(1.0, 1.0).lam == 0 and CLEAN.lam == math.inf and Level(0.0, 1.0).lam == -math.inf


@pytest.mark.law
def test_threshold_works_per_sample():
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])
    out = threshold(x0, 1.0, 10.0)
    torch.testing.assert_close(out[0], x0[0] / 4)
    torch.testing.assert_close(out[1], x0[1])


@pytest.mark.contract
def test_subclasses_and_lookalikes():
    class Mine(diffusers.UniPCMultistepScheduler):
        pass

    assert family(Mine(**FLOW)) is KNOWN["UniPCMultistepScheduler"].family

    class Foreign:
        def __init__(self, like):
            self.config, self.timesteps = like.config, like.timesteps
            for name in ("sigmas", "alphas_cumprod"):
                if hasattr(like, name):
                    setattr(self, name, getattr(like, name))

    for name in ("DDIM", "EulerDiscrete", "UniPCMultistep", "FlowMatchEulerDiscrete"):
        like = make(name, **({} if name.startswith("Flow") else SD))
        output, x, t = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1), like.timesteps[2]
        assert torch.equal(x0hat(Foreign(like), output, t, x), x0hat(like, output, t, x)), name


@pytest.mark.contract
def test_bad_input_gets_a_sentence():
    ddim, x = make("DDIM"), randn(1, 2, 4, 4)
    amused = diffusers.AmusedScheduler(mask_token_id=3)
    with pytest.raises(ValueError, match=r"AmusedScheduler .* supported are DDIMScheduler"):
        x0hat(amused, x, 1, x)
    with pytest.raises(ValueError, match="object is a scheduler whose noise levels"):
        level(object(), 1)
    with pytest.raises(ValueError, match="has 2 values, allowed is one for the batch"):
        x0hat(ddim, x, torch.tensor([1, 2]), x)
    with pytest.raises(ValueError, match=r"timestep 3.5 is not one of the 5 timesteps"):
        level(make("EulerDiscrete"), 3.5)
    with pytest.raises(ValueError, match="step_index 5 is outside the 5 steps"):
        level(ddim, step_index=5)
    with pytest.raises(ValueError, match="neither timestep nor step_index"):
        level(ddim)
    zero = make("DDIM", 4, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="alpha = 0"):
        x0hat(zero, x, zero.timesteps[0], x)
    with pytest.raises(ValueError, match="set use_flow_sigmas=True"):
        level_of = make("UniPCMultistep", prediction_type="flow_prediction")
        x0hat(level_of, x, level_of.timesteps[0], x)
    with pytest.raises(ValueError, match="finite alpha"):
        Level(-1.0, 0.0)


@pytest.mark.contract
def test_device_tables_are_copied_once_per_version(monkeypatch):
    """The host copy is exercised with a table that claims another device."""
    from diffplug.noise import position as noise_index

    table = torch.arange(4.0)
    assert noise_index._copy(table) is noise_index._copy(table)
    table[2] = 7.0
    assert noise_index._copy(table)[2] == 7.0
    assert host(table, 2) == 7.0
    assert [noise_index._entry(t, table) for t in table] == [0, 1, 2, 3]
    assert [noise_index._entry(t, table[1:]) for t in table[1:]] == [0, 1, 2]
    assert noise_index._entry(table[1].clone(), table) is None
