"""Permuting the particles in the middle of a run permutes the result, bit for bit, for every solver."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance, MomentumBuffer

from diffplug import samplers
from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.steering.engine.history import Rows, move_particles, reindex, reindex_scheduler
from diffplug.testing.closed_form.chain import BETAS, ddim

pytestmark = pytest.mark.law

PERMUTATION = torch.tensor([2, 0, 3, 1])
ROWS = Rows(PERMUTATION)


def vp(name: str, **options: Any) -> Callable[[], Any]:
    """Return a builder of a scheduler with the betas of Stable Diffusion."""
    known = inspect.signature(getattr(diffusers, name)).parameters
    betas = {key: value for key, value in BETAS.items() if key in known}
    return lambda: getattr(diffusers, name)(**betas, **options)


def bare(name: str, **options: Any) -> Callable[[], Any]:
    """Return a builder of a scheduler that has its own noise levels."""
    return lambda: getattr(diffusers, name)(**options)


def ours(name: str, **options: Any) -> Callable[[], Any]:
    """Return a builder of a scheduler of this package with the betas of Stable Diffusion."""
    return lambda: getattr(samplers, name)(**BETAS, **options)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DPM = "DPMSolverMultistepScheduler"
SCHEDULERS = {
    "ddim": vp("DDIMScheduler"),
    "euler": vp("EulerDiscreteScheduler"),
    "dpm2": vp(DPM),
    "dpm3": vp(DPM, solver_order=3),
    "dpm-eps": vp(DPM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm-sde": vp(DPM, algorithm_type="sde-dpmsolver++"),
    "dpm-flow": vp(DPM, **FLOW),
    "dpm-single": vp("DPMSolverSinglestepScheduler"),
    "deis": vp("DEISMultistepScheduler"),
    "unipc2": vp("UniPCMultistepScheduler"),
    "unipc3": vp("UniPCMultistepScheduler", solver_order=3),
    "sa": vp("SASolverScheduler", tau_func=lambda t: 0.0),
    "pndm": vp("PNDMScheduler", skip_prk_steps=True),
    "pndm-prk": vp("PNDMScheduler", skip_prk_steps=False),
    "heun": vp("HeunDiscreteScheduler"),
    "kdpm2": vp("KDPM2DiscreteScheduler"),
    "lms": vp("LMSDiscreteScheduler"),
    "ipndm": bare("IPNDMScheduler"),
    "edm-euler": bare("EDMEulerScheduler"),
    "edm-dpm": bare("EDMDPMSolverMultistepScheduler"),
    "flow-euler": bare("FlowMatchEulerDiscreteScheduler"),
    "flow-heun": bare("FlowMatchHeunDiscreteScheduler"),
    "edm-dpm3": bare("EDMDPMSolverMultistepScheduler", solver_order=3),
    "dpm-eps-sde": vp(DPM, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
    "dpm-sde-tree": vp("DPMSolverSDEScheduler"),
    "tcd": vp("TCDScheduler"),
    "dc": ours("DCSolverScheduler"),
    "table-unipc3": ours("SolverScheduler", solver="unipc", solver_options={"order": 3}),
    "table-deis": ours("SolverScheduler", solver="deis"),
    "table-single": ours("SolverScheduler", solver="singlestep"),
}
REMEMBERS = (
    "dpm2",
    "dpm3",
    "dpm-sde",
    "dpm-single",
    "deis",
    "unipc2",
    "sa",
    "pndm",
    "heun",
    "kdpm2",
    "lms",
    "ipndm",
    "edm-dpm3",
    "dpm-sde-tree",
    "dc",
    "table-deis",
    "table-single",
)


class Permute(StepInterceptor):
    """Permutes the batch at one call; `history=False` forgets the solver's memory, as a careless steerer
    would.
    """

    def __init__(self, at: int, history: bool = True) -> None:
        self.at, self.history, self.made = at, history, 0

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result, of permuted particles at the chosen call."""
        if self.made == self.at and self.history:
            move_particles(call, ROWS)
        elif self.made == self.at:
            call.sample, call.model_output = call.sample[PERMUTATION], call.model_output[PERMUTATION]
        self.made += 1
        return call.run()


def name_of(scheduler: Any) -> str:
    """Return the name of a scheduler's class."""
    return type(scheduler).__name__


def run(build: Callable[[], Any], interceptor: StepInterceptor) -> tuple[torch.Tensor, int]:
    """Return the end of an 8-step run with a row-wise network, and the number of calls it took."""
    scheduler = build()
    x = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(8)
    noise = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1, -1)
    kwargs: dict[str, Any] = {}
    if "sde" in getattr(scheduler.config, "algorithm_type", ""):
        kwargs["variance_noise"] = noise
    if hasattr(scheduler, "noise_sampler"):  # fresh noise belongs to the slot: here all slots have the same
        scheduler.noise_sampler = lambda *sigmas: noise
    if name_of(scheduler) == "TCDScheduler":
        kwargs["eta"] = 0.0
    undo = intercept_step(scheduler, interceptor)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.tanh(1.7 * scaled + 1e-3 * float(t)), t, x, **kwargs).prev_sample
    undo()
    return x, len(scheduler.timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_permutation_in_the_middle_permutes_the_end(name: str) -> None:
    plain, calls = run(SCHEDULERS[name], StepInterceptor())
    for at in range(calls) if calls < 12 else (1, 4, 7, 10):
        assert torch.equal(run(SCHEDULERS[name], Permute(at))[0], plain[PERMUTATION]), f"call {at}"


@pytest.mark.parametrize("name", REMEMBERS)
def test_without_its_history_the_end_is_another(name: str) -> None:
    plain, _ = run(SCHEDULERS[name], StepInterceptor())
    wrong = [run(SCHEDULERS[name], Permute(at, history=False))[0] for at in (3, 4, 5)]
    assert max(float((end - plain[PERMUTATION]).abs().max()) for end in wrong) > 1e-4


class Remembering:
    """A stand-in for a scheduler that names its per-sample state."""

    def __init__(self) -> None:
        self.features = torch.arange(4.0)
        self.sigmas = torch.arange(4.0)
        self.outputs = [None, torch.arange(4.0)[:, None]]

    def per_sample_state(self) -> list[str]:
        """Return the attributes with one row per sample."""
        return ["features", "outputs"]


def test_a_scheduler_may_name_its_own_state() -> None:
    scheduler = Remembering()
    reindex_scheduler(scheduler, ROWS, {torch.Size([4, 9])})
    assert scheduler.features.tolist() == [2, 0, 3, 1]
    assert scheduler.outputs[0] is None
    assert scheduler.outputs[1][:, 0].tolist() == [2, 0, 3, 1]
    assert scheduler.sigmas.tolist() == [0, 1, 2, 3]


def test_step_arguments_move_but_fresh_noise_stays() -> None:
    old, noise = torch.arange(8.0).reshape(4, 2), torch.arange(8.0).reshape(4, 2)
    given = {"old_pred_original_sample": old, "variance_noise": noise, "eta": 1.0, "generator": None}
    call = StepCall(ddim(), old, 0, old, given)
    move_particles(call, ROWS)
    moved = call.kwargs
    assert torch.equal(moved["old_pred_original_sample"], old[PERMUTATION])
    assert moved["variance_noise"] is noise
    assert moved["eta"] == 1.0


def test_what_has_no_rows_is_handed_back_as_it_is() -> None:
    values: list[Any] = [None, 3, torch.arange(4.0)]
    assert reindex(values, ROWS, {torch.Size([4, 2])}) is values


@pytest.mark.parametrize("moved", [True, False])
def test_the_momentum_of_a_guider_goes_with_its_particle(moved: bool) -> None:
    x = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def end(rows: Rows | None, guiders: bool) -> torch.Tensor:
        guider = AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5)
        guider.momentum_buffer = MomentumBuffer(-0.5)
        state = x
        for step in range(4):
            if step == 2 and rows is not None:
                call = StepCall(ddim(), state, 0, state, {})
                move_particles(call, rows, [guider] if guiders else [])
                state = call.sample
            state = state - 0.2 * guider.forward(torch.tanh(2 * state), torch.tanh(state)).pred
        return state

    wanted = end(None, True)[PERMUTATION]
    assert torch.equal(end(ROWS, moved), wanted) is moved
