"""Exact properties of PSO beyond its first gradient: parameterisations, ties of paths, reference, memory."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffplug.noise.gaussian_step import ancestral_form
from diffplug.noise.noise_level import Level
from diffplug.training.job import Job
from diffplug.training.noise_path import NoisePath
from diffplug.training.objective import Rows
from diffplug.training.objectives.preference.pso import PSO
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.online import Drawn
from diffplug.training.preference.pair_loss import pair_loss
from diffplug.training.preference.rollout import Paths
from tests.training.preference.test_pso import DOUBLE, made, rows, shaken
from tests.training.toy import VP

FLOW = NoisePath.of(FlowMatchEulerDiscreteScheduler(shift=1.0))
KINDS = ["epsilon", "v_prediction", "sample", "flow_prediction"]
INDEX = torch.tensor([1000.0, 750, 500])


def drawn(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, generator=generator, dtype=DOUBLE)


@pytest.mark.law
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradient_reaches_the_output_of_every_parameterisation(kind: str) -> None:
    """dL/d output = -+ beta / 2 a / (s D) z dx0hat/d output."""
    path = FLOW if kind == "flow_prediction" else NoisePath(VP.abar, kind)
    kernel, beta = Kernel.ddim(path, 4, 1.0), 50.0
    steps = torch.tensor([0, 1, 2])
    (alpha, sigma), (x, output, z) = path.levels(kernel.index[steps]), drawn(3)
    slope = {
        "epsilon": -sigma / alpha,
        "v_prediction": -sigma,
        "sample": torch.ones(3),
        "flow_prediction": -sigma,
    }
    output.requires_grad_()
    x0 = path.predict(output, x, kernel.index[steps]).x0
    ells = [
        kernel.log_ratio(x, x0, x0.detach(), kernel.sample(x, x0.detach(), steps, sign * z), steps)[None]
        for sign in (1, -1)
    ]
    pair_loss(*ells, beta=beta).errors.sum().backward()
    a, s = (torch.tensor([getattr(kernel.forms[i], n) for i in (0, 1, 2)], dtype=DOUBLE) for n in ("a", "s"))
    told = -2 * (beta / 2 * a / (s * 2) * slope[kind])[:, None] * z  # the loser's noise is -z
    assert output.grad is not None and torch.allclose(output.grad, told, rtol=1e-9)


@pytest.mark.law
def test_copies_of_one_function_have_one_loss_and_one_gradient() -> None:
    """Flows too: the same levels in their own scale, alpha + sigma = 1."""
    alpha, sigma = (
        torch.cat([v, t]) for v, t in zip(VP.levels(INDEX), VP.levels(torch.tensor([250.0])), strict=True)
    )
    x, x0, ref, moved, z, other = drawn(6)
    found = {}
    for kind in KINDS:
        scale = alpha + sigma if kind == "flow_prediction" else torch.ones(4, dtype=DOUBLE)
        levels = [Level(float(a), float(s)) for a, s in zip(alpha / scale, sigma / scale, strict=True)]
        forms = tuple(ancestral_form(a, b, 1.0) for a, b in pairwise(levels))
        path = FLOW if kind == "flow_prediction" else NoisePath(VP.abar, kind)
        index = torch.tensor([path.index_of(at.alpha, at.sigma) for at in levels[:3]], dtype=DOUBLE)
        kernel = Kernel(path, index, torch.ones(3, dtype=DOUBLE), forms)
        here = x / scale[:3, None]
        said = (x0 + 0.1 * moved).requires_grad_()
        a, s = (v.view(3, 1) for v in path.levels(index))
        eps = (here - a * said) / s
        output = {
            "epsilon": eps,
            "v_prediction": a * eps - s * said,
            "sample": said,
            "flow_prediction": eps - said,
        }
        again = path.predict(output[kind], here, index).x0
        steps = torch.arange(3)
        ells = [
            kernel.log_ratio(here, again, ref, kernel.sample(here, x0, steps, noise), steps)[None]
            for noise in (z, other)
        ]
        loss = pair_loss(*ells, beta=5.0).errors
        (gradient,) = torch.autograd.grad(loss.sum(), said)
        found[kind] = (loss.detach(), gradient)
    for loss, gradient in found.values():
        assert torch.allclose(loss, found["epsilon"][0], rtol=1e-8)
        assert torch.allclose(gradient, found["epsilon"][1], rtol=1e-6, atol=1e-12)


@pytest.mark.law
def test_two_equal_paths_teach_nothing_whatever_their_scores() -> None:
    objective = made()
    shaken(objective)
    first = objective.drawn(rows(4))
    twice = torch.arange(4).mul(2).repeat_interleave(2)
    same = Drawn(
        Paths(first.paths.states[twice], first.paths.x0[twice]),
        first.conditions[twice],
        torch.tensor([[1.0, 0.0]] * 4, dtype=DOUBLE),
    )
    loss = objective.compared(same)
    assert torch.allclose(loss.errors, torch.full_like(loss.errors, math.log(2)))
    gradient = torch.autograd.grad(loss.sum, list(objective.network.weights.values()), allow_unused=True)
    assert all(value is None or float(value.abs().max()) < 1e-12 for value in gradient)


def shapes_job(*changes: str) -> Job:
    words = [
        "student.start=shapes", "student.steps=4", "data.count=4", "tuner.rank=2", "run.batch=2",
        "objective.gauges.every=0", "run.precision=no",
    ]  # fmt: skip
    return Job.read("pso", None, [*words, *changes])


def taller(latents: Tensor, prompts: list[str]) -> Tensor:
    return latents.double().flatten(1).mean(1).cpu()


def policy_gradient(job: Job) -> dict[str, Tensor]:
    """The gradient of one update, with a policy that is no longer its start."""
    objective = PSO.from_job(job)
    objective.scorer = taller
    generator = torch.Generator().manual_seed(3)
    for value in job.tuner.parameters.values():
        value.data = torch.randn(value.shape, generator=generator) * 0.02
        value.grad = None
    objective.loss(Rows(0, 0, 2, range(2))).sum.backward()
    return {
        name: value.grad.clone() for name, value in job.tuner.parameters.items() if value.grad is not None
    }


@pytest.mark.law
@pytest.mark.pipe
def test_gradient_checkpointing_changes_no_gradient_and_nothing_moves_the_reference() -> None:
    """The adapter is off in the reference's pass; what is computed again for the gradient must have it on."""
    job = shapes_job()
    denoiser: Any = job.pipe.unet
    tuned = set(job.tuner.parameters)
    frozen = {name: v.detach().clone() for name, v in denoiser.named_parameters() if name not in tuned}
    x, index = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([750.0])
    before = job.network.original(x, index, job.conditions[:1]).x0
    plain = policy_gradient(job)
    denoiser.enable_gradient_checkpointing()
    computed = []
    block = denoiser.down_blocks[0].resnets[0]
    hook = block.register_forward_pre_hook(lambda *told: computed.append(torch.is_grad_enabled()))
    again = policy_gradient(job)
    hook.remove()
    denoiser.disable_gradient_checkpointing()
    assert computed.count(True) == 1 + 1  # the policy, and once more for its gradient
    assert plain.keys() == again.keys() and len(plain) == len(tuned)
    largest = max(float(value.abs().max()) for value in plain.values())
    assert largest > 0
    assert all(torch.allclose(value, again[name], atol=1e-5 * largest) for name, value in plain.items())
    assert torch.equal(job.network.original(x, index, job.conditions[:1]).x0, before)
    assert all(torch.equal(v, frozen[name]) for name, v in denoiser.named_parameters() if name in frozen)
