"""Churn turns deterministic solvers into ancestral ones where it acts, and undoes none of their rules."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from benchmarks.steering.chain import ChainRule
from diffplug.intercept import intercept_step
from diffplug.noise.families import levels
from diffplug.noise.stochastic import adds_noise
from diffplug.plug import plug
from diffplug.samplers import DCSolverScheduler, SolverScheduler
from diffplug.steering import SVDD, Churn, FeynmanKac, Resampling, stochastic
from diffplug.steering.engine.score_times import Plan, every_call
from diffplug.steering.engine.step import ParticleSteps
from diffplug.steering.proposals import ChurnedSteps
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.testing import tiny
from diffplug.testing.closed_form.chain import BETAS, GAUSSIAN, ddim, denoise
from diffplug.transition import ancestral

law, on_pipe = pytest.mark.law, pytest.mark.pipe


def engine(plan: Plan, strength: float = 1e-12, k: int = 4, eta: float = 1.0) -> ParticleSteps:
    """Return an engine that churns at the calls of a plan; by default its selections do nothing."""
    rule = ChainRule(
        k,
        plan,
        lambda groups: ParticleFilter(
            groups=groups,
            particles=k,
            potential=Difference(strength=strength, tilt="constant"),
            generators=[torch.Generator().manual_seed(1)],
            ess_threshold=0.5 if strength < 1e-3 else None,
        ),
    )
    churn = ChurnedSteps(Churn(eta), lambda groups: list(range(groups)))
    return ParticleSteps(rule, lambda step: step.x0[:, 0], proposal=churn)


def churned(scheduler: Any, plan: Plan = every_call, rows: int = 3000, strength: float = 1e-12) -> Any:
    """Return the end of a 20-step chain on N(1, .25), and its engine."""
    stand = engine(plan, strength)
    x = torch.randn(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    undo = intercept_step(scheduler, stand)
    scheduler.set_timesteps(20)
    x = denoise(scheduler, GAUSSIAN, x * float(scheduler.init_noise_sigma))
    undo()
    return x[:, 0], stand


@law
@pytest.mark.parametrize(
    "build",
    [
        ddim,
        lambda: DPMSolverMultistepScheduler(**BETAS),
        lambda: UniPCMultistepScheduler(**BETAS),
        lambda: EulerDiscreteScheduler(**BETAS),
        lambda: HeunDiscreteScheduler(**BETAS),
    ],
)
def test_churn_at_every_call_is_ancestral_sampling(build: Any) -> None:
    """DDIM with eta = 1 ends at N(.99883, .16664) in 20 steps; the same chain whatever the solver."""
    x, _ = churned(build())
    assert float(x.mean()) == pytest.approx(0.9988, abs=0.03)
    assert float(x.var()) == pytest.approx(0.16664, abs=0.016)


@law
@pytest.mark.parametrize(
    "build",
    [
        lambda: DEISMultistepScheduler(**BETAS),
        lambda: DEISMultistepScheduler(**BETAS, solver_order=3),
        lambda: DPMSolverMultistepScheduler(
            **BETAS, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
        ),
    ],
)
def test_solvers_that_extrapolate_noise_take_no_slope_from_fresh_noise(build: Any) -> None:
    """Their last step ends at a small sigma instead of 0: first order gives .1726; with the history .21 to
    .32.
    """
    x, _ = churned(build())
    assert float(x.mean()) == pytest.approx(0.997, abs=0.03)
    assert float(x.var()) == pytest.approx(0.1726, abs=0.016)


def every_other(n: int) -> range:
    """Return the plan that scores every second call."""
    return range(0, n - 1, 2)


def first_order(scheduler: Any, plan: Plan) -> float:
    """Return the exact variance of 20 first-order steps on N(1, .25), ancestral at the calls of a plan."""
    scheduler.set_timesteps(20)
    noised, variance = set(plan(20)), float(scheduler.init_noise_sigma) ** 2
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    path = levels(scheduler)
    for i, (here, there) in enumerate(pairwise(path)):
        step = ancestral(
            x, GAUSSIAN.x0hat(x, here.alpha, here.sigma), here, there, 1.0 if i in noised else 0.0
        )
        variance = float(step.mean[1] - step.mean[0]) ** 2 * variance + step.std**2
    return variance


@law
def test_cogvideox_ignores_eta_and_takes_churn() -> None:
    def build() -> Any:
        return CogVideoXDDIMScheduler(
            beta_start=BETAS["beta_start"],
            beta_end=BETAS["beta_end"],
            timestep_spacing="trailing",
            clip_sample=False,
        )

    assert not adds_noise(build(), eta=1.0)
    x, _ = churned(build(), rows=12_000)
    assert float(x.var()) == pytest.approx(first_order(build(), every_call), abs=0.008)


@law
@pytest.mark.parametrize(
    "build",
    [
        lambda: IPNDMScheduler(),
        lambda: DEISMultistepScheduler(**BETAS, solver_order=3),
        lambda: UniPCMultistepScheduler(
            **BETAS, predict_x0=False, solver_order=3, final_sigmas_type="sigma_min"
        ),
        lambda: SASolverScheduler(
            **BETAS, algorithm_type="noise_prediction", predictor_order=3, tau_func=lambda t: 0.0
        ),
        lambda: SolverScheduler(**BETAS, solver="ipndm"),
        lambda: SolverScheduler(**BETAS, solver="deis", solver_options={"order": 3}),
        lambda: SolverScheduler(**BETAS, solver="singlestep"),
    ],
)
def test_after_noise_what_extrapolates_it_starts_anew(build: Any) -> None:
    """Noise at every other call leaves such solvers at first order throughout; with their history the
    variance is off by .01 to .03.
    """
    x, _ = churned(build(), every_other, rows=12_000)
    assert float(x.var()) == pytest.approx(first_order(build(), every_other), abs=0.006)


@law
@pytest.mark.parametrize(("solver", "kept"), [("dpm++", True), ("unipc", True), ("deis", False)])
def test_what_looks_at_clean_predictions_keeps_its_history(solver: str, kept: bool) -> None:
    scheduler = SolverScheduler(**BETAS, solver=solver)
    scheduler.set_timesteps(20)
    x = torch.ones(4, 1)
    for t in scheduler.timesteps[:12]:
        scheduler.step(x, t, x)
    held = len(scheduler.model_outputs)
    scheduler.forget_history()
    assert held > 1 and len(scheduler.model_outputs) == (held if kept else 0)
    assert scheduler.last_sample is None


@law
def test_a_corrector_that_remembers_takes_noise_out_again() -> None:
    """All start at one point and are churned once: what spreads them at the end is that noise alone."""

    class Remembering(UniPCMultistepScheduler):
        def __setattr__(self, name: str, value: Any) -> None:
            if not (name == "last_sample" and value is None and getattr(self, "_step_index", None)):
                super().__setattr__(name, value)

    def spread(scheduler: Any) -> float:
        stand = engine(lambda n: [10])
        undo = intercept_step(scheduler, stand)
        scheduler.set_timesteps(20)
        x = denoise(scheduler, GAUSSIAN, torch.full((2000, 1), 0.5, dtype=torch.float64))
        undo()
        return float(x.var())

    assert spread(Remembering(**BETAS)) < 0.7 * spread(UniPCMultistepScheduler(**BETAS))


@law
def test_the_flow_recipe_has_the_variance_of_the_ancestral_step() -> None:
    """Uniform sigmas from 1 to 0, 28 steps, data N(1, .25): .202 (ODE: .225)."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    stand = engine(every_call)
    undo = intercept_step(scheduler, stand)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28))
    x = torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        x0 = GAUSSIAN.x0hat(x, 1 - sigma, sigma)
        x = scheduler.step((x - x0) / sigma, t, x).prev_sample
    undo()
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(x.var()) == pytest.approx(0.202, abs=0.016)


@law
def test_copies_part_and_the_normaliser_stays_unbiased() -> None:
    x, stand = churned(DPMSolverMultistepScheduler(**BETAS), rows=4000, strength=2.0)
    assert all(len(row.unique()) == 4 for row in x.reshape(-1, 4)[:50])
    assert not stand.watch.warned
    ratio = stand.filter.finish(x)[1].exp() / 10.2877135
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(ratio) ** 0.5


@law
def test_solvers_that_would_undo_it_are_refused() -> None:
    with pytest.raises(
        ValueError, match="DPMSolverSinglestepScheduler cannot be churned: take one of .*DDIM"
    ):
        churned(DPMSolverSinglestepScheduler(), rows=4)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="churn="):
            Churn(eta)


@law
def test_noise_is_recognised() -> None:
    assert adds_noise(EulerAncestralDiscreteScheduler())
    assert not adds_noise(ddim())
    assert adds_noise(ddim(), eta=1.0)
    assert not adds_noise(DPMSolverMultistepScheduler())
    assert adds_noise(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert not adds_noise(FlowMatchEulerDiscreteScheduler())
    assert adds_noise(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    ancestral = EulerAncestralDiscreteScheduler()
    assert stochastic(ancestral) is ancestral
    assert stochastic(ddim()).config.solver_order == 1  # the second goes astray with guidance and few steps
    with pytest.raises(ValueError, match="order=3: SDE-DPM-Solver"):
        stochastic(ddim(), order=3)


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


@on_pipe
@pytest.mark.parametrize("sampler", [DCSolverScheduler, SolverScheduler])
def test_solvers_of_ours_are_steered_with_churn(sampler: Any) -> None:
    pipe = tiny("sd15")
    steerer = FeynmanKac(
        red,
        particles=4,
        strength=5.0,
        proposal=Churn(1.0),
        returns="all",
        selection=Resampling(ess_threshold=None),
    )
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), plug(pipe, sampler, steerer):
        warnings.simplefilter("error", UserWarning)
        images = pipe("a", num_inference_steps=6, output_type="pt", generator=generator).images
    assert len({image.numpy().tobytes() for image in images}) == 4
    assert steerer.report.resampled.any()


@on_pipe
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "flux-schnell"])
@pytest.mark.parametrize("recipe", ["stochastic", "churn"])
def test_deterministic_pipelines_can_be_steered(family: str, recipe: str) -> None:
    pipe = tiny(family)
    if recipe == "stochastic":
        pipe.scheduler = stochastic(pipe.scheduler)
        assert adds_noise(pipe.scheduler)
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    steerer = SVDD(
        red, particles=4, strength=1.0, returns="all", proposal=Churn() if recipe == "churn" else None
    )
    given = tiny.inputs(family, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    ends = []
    for _ in range(2 if recipe == "churn" else 1):
        with plug(pipe, steerer):
            ends.append(pipe(**{**given, "generator": torch.Generator().manual_seed(0)}).images)
    assert len({image.numpy().tobytes() for image in ends[0]}) == 4
    assert torch.equal(ends[0], ends[-1]), "churn has its own streams, so runs repeat"
