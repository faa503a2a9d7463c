"""What a pipeline's own scheduler says, and a plug of ours takes over: grids, ends, orders, given sigmas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffplug.plug import plug
from diffplug.samplers import DCSolver, DCSolverScheduler, Solver, SolverScheduler
from diffplug.samplers.schedule import presets
from diffplug.testing import tiny

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE: dict[str, Any] = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def latents(pipe: Any, name: str, *plugs: Any, **call: Any) -> torch.Tensor:
    with plug(pipe, *plugs):
        start = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**tiny.inputs(name, output_type="latent", generator=start, **call))[0])


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.pipe
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("more", [{}, {"shift_terminal": 0.02}], ids=["plain", "terminal"])
def test_flow_grids_are_those_of_flow_matching_euler(kind: str, more: dict[str, Any]) -> None:
    pipe = tiny("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{kind}_sigmas": True}, **more)
    own, ours = pipe.scheduler, Solver(solver="ddim").scheduler_for(pipe)
    for steps in (1, 2, 4, 9)[bool(more) :]:  # Diffusers' own is NaN for one step to a terminal
        own.set_timesteps(steps)
        ours.set_timesteps(steps)
        torch.testing.assert_close(ours.sigmas, own.sigmas, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.timesteps, own.timesteps, rtol=1e-5, atol=1e-3)
    assert off(latents(pipe, "sd3", Solver(solver="ddim")), latents(pipe, "sd3")) < 1e-5


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_flow_grids_on_pipelines_that_send_or_drop_their_own(name: str) -> None:
    pipe = tiny(name)
    config = {**pipe.scheduler.config, "use_beta_sigmas": True}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    one, other = (latents(pipe, name, *p, num_inference_steps=4) for p in ([Solver(solver="ddim")], []))
    assert off(one, other) < 1e-4


@pytest.mark.law
def test_no_flow_model_is_told_a_sigma_above_one() -> None:
    high = presets.ddim(2, presets.Nodes(kind="sigmas", values=(3.0, 0.5), final="zero"))
    with pytest.raises(ValueError, match="end at 1, the grid starts at 3"):
        SolverScheduler(schedules=high, **FLOW).set_timesteps(2)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["flux", "flux2-klein"])
@pytest.mark.parametrize("one", [Solver(solver="ddim"), DCSolver([1, 1, 0.9, 1.1])], ids=["solver", "dc"])
def test_sigmas_that_a_pipeline_drops_are_used(name: str, one: Any) -> None:
    pipe, told = tiny(name), []
    net = pipe.transformer
    hook = net.register_forward_pre_hook(
        lambda m, a, k: told.append(float(k["timestep"][0])), with_kwargs=True
    )
    call = {k: v for k, v in tiny.inputs(name).items() if k != "num_inference_steps"}
    nodes = [1.0, 0.9, 0.6, 0.2]
    with plug(pipe, one):
        pipe(**call, sigmas=nodes)
    hook.remove()
    assert sorted(set(told), reverse=True) == pytest.approx(nodes)
    if isinstance(one, Solver):
        with plug(pipe, Solver(presets.ddim(4))), pytest.raises(ValueError, match="grids of their own"):
            pipe(**call, sigmas=nodes)


@pytest.mark.pipe
def test_flux_without_sigmas_runs_its_own_grid() -> None:
    pipe = tiny("flux")
    one, other = (latents(pipe, "flux", *p, num_inference_steps=4) for p in ([Solver(solver="ddim")], []))
    assert off(one, other) < 1e-5


@pytest.mark.pipe
@pytest.mark.parametrize("steps", [5, 15, 20])
def test_a_last_step_of_no_length_is_the_identity(steps: int) -> None:
    pipe = tiny("sd15")
    pipe.scheduler = DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    own = latents(pipe, "sd15", num_inference_steps=steps)
    assert off(latents(pipe, "sd15", Solver(solver="dpm++"), num_inference_steps=steps), own) < 5e-6
    for name in ("deis", "res_multistep", "ipndm", "singlestep", "unipc"):
        scheduler = SolverScheduler(
            **BETAS, solver=name, use_karras_sigmas=True, final_sigmas_type="sigma_min"
        )
        scheduler.set_timesteps(steps)
        assert len(scheduler.table.steps[-1].predict) == 1
    full = SolverScheduler(
        **BETAS, lower_order_final=False, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    full.set_timesteps(5)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dpm++", DPMSolverMultistepScheduler(**BETAS, solver_order=3)),
        ("dpm++", DPMSolverMultistepScheduler(**BETAS, solver_type="heun")),
        ("dpm++", DPMSolverMultistepScheduler(**BETAS, **NOISE)),
        ("dpm++", DPMSolverMultistepScheduler(**BETAS, lower_order_final=False)),
        ("singlestep", DPMSolverSinglestepScheduler(**BETAS, solver_order=3)),
    ],
    ids=["order", "heun", "noise", "full", "singlestep"],
)  # fmt: skip
def test_a_solver_of_the_same_name_takes_its_options_over(name: str, own: Any) -> None:
    pipe = tiny("sd15")
    pipe.scheduler = own
    wanted = latents(pipe, "sd15", num_inference_steps=7)
    assert off(latents(pipe, "sd15", Solver(solver=name), num_inference_steps=7), wanted) < 5e-6
    order = Solver(solver=name, solver_options={"order": 1}).scheduler_for(pipe).config.solver_options
    assert order == {"order": 1}


@pytest.mark.pipe
def test_grids_that_no_other_class_has_are_refused_unless_something_else_decides() -> None:
    pipe = tiny("sd15")
    pipe.scheduler = DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True)
    with pytest.raises(ValueError, match=r"use_lu_lambdas=True of DPMSolverMultistepScheduler has no equal"):
        plug(pipe, Solver(solver="dpm++"))
    for one in (Solver(solver="dpm++", grid="log-snr"), Solver(presets.ddim(2)), DCSolver()):
        latents(pipe, "sd15", one)


@pytest.mark.law
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "dpm++", "solver_order": 3}, "solver_order=3 does nothing here: solver= decides"),
        ({"solver": "deis", "predict_x0": False}, "predict_x0=False does nothing"),
        ({"solver": "ddim", "disable_corrector": [1]}, "disable_corrector"),
        ({"grid": "karras", "timestep_spacing": "trailing"}, "grid= decides where steps lie"),
        ({"grid": "karras", "use_beta_sigmas": True}, "use_beta_sigmas=True does nothing"),
        ({"grid": "karras", "sigma_max": 5.0}, "sigma_max=5.0 does nothing"),
        ({"grid": "karras", "steps_offset": 1}, "steps_offset=1 does nothing"),
        ({"use_karras_sigmas": True, "timestep_spacing": "trailing"}, "timestep_spacing='trailing'"),
        ({"sigma_min": 0.1}, "it is the range of use_karras_sigmas"),
        ({"timestep_spacing": "trailing", "steps_offset": 1}, "timestep_spacing='leading'"),
        ({"sample_max_value": 2.0}, "it is for thresholding=True"),
        ({"clip_sample_range": 2.0}, "it is for clip_sample=True"),
        ({"flow_shift": 3.0}, "it is for flow models"),
        ({**FLOW, "timestep_spacing": "trailing"}, "the model is for flow matching"),
        ({"time_shift_type": "linear"}, "it is for use_dynamic_shifting"),
    ],
    ids=range(15),
)
def test_options_without_effect_are_refused_by_the_one_that_decides(
    options: dict[str, Any], said: str
) -> None:
    classes = [Solver, SolverScheduler] + [DCSolver, DCSolverScheduler] * ("solver" not in options)
    for cls in classes:
        with pytest.raises(ValueError, match=said):
            cls(**options)


@pytest.mark.law
def test_beside_schedules_most_options_do_nothing() -> None:
    file = presets.dpmpp(6, "karras")
    for options in (
        {"grid": "trailing"},
        {"final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
        {"solver_options": {"order": 3}},
    ):
        with pytest.raises(ValueError, match="the schedules decide everything"):
            Solver(file, **options)
    Solver(file, solver="dpm++", grid="karras", solver_options={"order": 3}, final_sigmas_type="sigma_min")


@pytest.mark.pipe
def test_what_only_comes_along_is_no_reason_to_refuse() -> None:
    """Configurations from the hub tell everything, also what a person's own options decide."""
    pipe = tiny("sd15")
    pipe.scheduler = DDIMScheduler(**BETAS, steps_offset=1, timestep_spacing="leading", clip_sample=False)
    for one in (
        Solver(grid="karras"), Solver(solver="dpm++", grid="log-snr"), Solver(use_karras_sigmas=True),
        Solver(timestep_spacing="trailing"), Solver(presets.ddim(2)), DCSolver(), DCSolver(grid="beta"),
    ):  # fmt: skip
        latents(pipe, "sd15", one)
    config = DPMSolverMultistepScheduler(**BETAS, solver_order=3, use_karras_sigmas=True).config
    again = SolverScheduler.from_config(config, grid="trailing", solver="dpm++")
    assert again.config.grid == "trailing"
    assert SolverScheduler.from_config(again.config).config.grid == "trailing"


@pytest.mark.pipe
def test_noise_between_steps_is_refused_before_the_first_evaluation() -> None:
    pipe = tiny("sd15")
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for plugged in (Solver(), DCSolver(), SolverScheduler):
        with plug(pipe, plugged), pytest.raises(ValueError, match="eta=0.5 does nothing"):
            pipe(**tiny.inputs("sd15"), eta=0.5)
    assert not calls
    latents(tiny("ddim"), "ddim", Solver(solver="dpm++"))  # which gives its step eta=0


@pytest.mark.law
def test_before_a_run_there_is_a_sentence() -> None:
    for scheduler in (SolverScheduler(), DCSolverScheduler()):
        x = torch.zeros(1)
        assert scheduler.scale_model_input(x, 0) is x
        for name in ("table", "schedule"):
            with pytest.raises(ValueError, match="call set_timesteps first"):
                getattr(scheduler, name)


@pytest.mark.law
def test_unipc_and_deis_configurations_are_still_taken() -> None:
    for own in (UniPCMultistepScheduler(**BETAS, solver_order=3), DEISMultistepScheduler(**BETAS)):
        pipe = tiny("sd15")
        pipe.scheduler = own
        assert Solver().scheduler_for(pipe).config.solver_order == own.config.solver_order
    assert replace(presets.ddim(2), meta={}).meta == {}
