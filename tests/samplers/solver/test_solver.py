"""SolverScheduler: the laws of samplers, Diffusers' habits, and a step that only adds up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from table_runs import FLOW, SD, noise_of, ours, start

from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.grids import GRIDS
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.solver.scheduler import SolverScheduler
from diffplug.testing.check_sampler import SAMPLER_LAWS, check_sampler
from diffplug.testing.closed_form.gaussian import GaussianModel

by_name = pytest.mark.parametrize("law", SAMPLER_LAWS, ids=lambda law: law.__name__)
UNIPC3 = {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
SOLVERS: dict[str, dict[str, Any]] = {
    "unipc": {},
    "unipc-3-noise": {**UNIPC3, "predict_x0": False},
    "dpm++-3": {"solver": "dpm++", "solver_options": {"order": 3}, "grid": "karras"},
    "ipndm": {"solver": "ipndm", "grid": "log-snr", "final_sigmas_type": "sigma_min"},
    "singlestep-3": {"solver": "singlestep", "solver_options": {"order": 3}, "grid": "beta57"},
    "flow-unipc": {**FLOW, "grid": "bong_tangent"},
}


def run(scheduler: Any, dtype: torch.dtype = torch.float64, steps: int = 6, **grid: Any) -> torch.Tensor:
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}))
    return finish(scheduler, start(dtype))


def finish(scheduler: Any, x: torch.Tensor, begin: int = 0, stop: int | None = None) -> torch.Tensor:
    for i, t in enumerate(scheduler.timesteps[begin:stop], begin):
        x = scheduler.step(noise_of(x, i), t, x, return_dict=False)[0]
    return x


@pytest.mark.contract
@by_name
@pytest.mark.parametrize("name", SOLVERS)
def test_presets_hold_every_law(name: str, law: Any) -> None:
    if law is not SAMPLER_LAWS[-1] or name == "unipc":  # one pipeline is enough
        check_sampler(lambda steps, **config: SolverScheduler(**{**SOLVERS[name], **config}), [law])


@pytest.mark.contract
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {**UNIPC3, "use_karras_sigmas": True},
        {**UNIPC3, "predict_x0": False},
        {"disable_corrector": [0, 2], "timestep_spacing": "leading", "steps_offset": 1},
        {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"thresholding": True, "sample_max_value": 1.5},
        FLOW,
    ],
    ids=str,
)
def test_without_more_options_it_is_unipc(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Diffusers works with float32 sigmas and adds up in another order: some roundings of difference."""
    wanted = run(UniPCMultistepScheduler(**{**SD, **config}), dtype)
    got = run(SolverScheduler(**{**SD, **config}), dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.law
@pytest.mark.parametrize("solver", sorted(presets.PRESETS))
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_every_grid_goes_with_every_preset(solver: str, grid: str) -> None:
    """A point mass is sampled exactly by any of them, and the network is told the levels of the nodes."""
    for final in ("zero", "sigma_min"):
        scheduler = SolverScheduler(**SD, solver=solver, grid=grid, final_sigmas_type=final)
        scheduler.set_timesteps(7)
        assert len(scheduler.timesteps) == 7 and len(scheduler.sigmas) == 8
        assert bool((scheduler.sigmas.diff() < 0).all())
        x, point = start(), 0.7
        for t, s in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
            alpha = 1 / (1 + s * s) ** 0.5
            x = scheduler.step((x - alpha * point) / (s * alpha), t, x).prev_sample
        end = float(scheduler.sigmas[-1])
        x = x * (1 + end**2) ** 0.5  # what is left of the noise is its own
        assert float((x - point).abs().max()) < (1e-9 if final == "zero" else 4 * end)


@pytest.mark.law
def test_sigmas_given_are_sigmas_used_bit_for_bit() -> None:
    given = [11.03, 4.57, 1.73, 0.61, 0.203]
    for solver in sorted(presets.PRESETS):
        scheduler = SolverScheduler(**SD, solver=solver)
        for wrap in (list, tuple, np.array, torch.tensor):
            scheduler.set_timesteps(sigmas=wrap(given))
            assert torch.equal(scheduler.sigmas, torch.tensor([*given, 0.0]))
        wanted = [float(np.float32(s)) for s in given] + [0.0]
        assert list(scheduler._table.sigmas) == wanted


@pytest.mark.law
def test_given_timesteps_are_told_to_the_network() -> None:
    scheduler = SolverScheduler(**SD)
    scheduler.set_timesteps(timesteps=[998.5, 400.25, 20])
    assert scheduler.timesteps.tolist() == [998.5, 400.25, 20.0]
    scheduler.set_timesteps(timesteps=np.array([999, 500, 20]))
    assert scheduler.timesteps.dtype == torch.int64
    flow = SolverScheduler(**FLOW)
    flow.set_timesteps(sigmas=[0.9, 0.55, 0.3])
    assert flow.timesteps.dtype == torch.float32
    torch.testing.assert_close(flow.timesteps, flow.sigmas[:-1] * 1000)


@pytest.mark.law
def test_flow_pipelines_default_sigmas_are_shifted() -> None:
    scheduler = SolverScheduler(**FLOW)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=2e-6)
    dynamic = SolverScheduler(**FLOW, use_dynamic_shifting=True, grid="trailing")
    dynamic.set_timesteps(2, mu=1.0)
    assert dynamic.sigmas.tolist() == pytest.approx([1.0, np.e / (np.e + 1), 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="`mu` must be passed"):
        dynamic.set_timesteps(2)


@pytest.mark.law
def test_a_schedule_lives_in_the_configuration(tmp_path: Any) -> None:
    schedules = [presets.ipndm(5, "log-snr"), presets.dpmpp(8, "beta57", order=3)]
    scheduler = SolverScheduler(**SD, schedules=schedules)
    scheduler.save_pretrained(tmp_path)
    for copied in (
        SolverScheduler.from_pretrained(tmp_path),
        SolverScheduler.from_config(scheduler.config),
        copy.deepcopy(scheduler),
    ):
        for steps in (5, 8):
            assert torch.equal(run(copied, steps=steps), run(scheduler, steps=steps))
    torch.testing.assert_close(run(scheduler, steps=5), ours(schedules[0]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="schedules are for 5, 8 steps, the pipeline asked for 6"):
        scheduler.set_timesteps(6)
    assert run(SolverScheduler(**SD, schedules=schedules, solver="ddim"), steps=6).isfinite().all()


@pytest.mark.law
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"solver": "unipcc"}, "Did you mean 'unipc'"),
        ({"grid": "karas"}, "Did you mean 'karras'"),
        ({"solver": "deis", "solver_options": {"order": 7}}, "order 7 of deis"),
        ({"schedules": []}, "schedules is empty"),
        ({"schedules": {"format": "other"}}, "no solver schedule"),
        ({"schedules": [presets.ddim(4), presets.ipndm(4)]}, "two schedules are for 4 steps"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas=True"),
        ({"use_flow_sigmas": True, "predict_x0": False}, "leave it out"),
        ({"solver_p": UniPCMultistepScheduler()}, "solver_p"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_refused_at_once(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SolverScheduler(**config)


@pytest.mark.law
def test_no_step_waits_for_the_device() -> None:
    """Tensors on the meta device have no values: whatever asks for one fails."""
    scheduler = SolverScheduler(**SD, solver_order=3)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = torch.zeros(2, 3, 4, 4, device="meta", dtype=torch.float16)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float16


@pytest.mark.contract
@pytest.mark.parametrize("begin", range(1, 7))
def test_a_late_start_is_diffusers_late_start(begin: int) -> None:
    """Orders ramp up again from where the run begins; nothing before it is looked at."""
    end = {"final_sigmas_type": "sigma_min"}
    third = {"solver_order": 3}
    pairs: list[tuple[dict[str, Any], Any]] = [
        ({"disable_corrector": [0, 3]}, UniPCMultistepScheduler(**SD, **end, disable_corrector=[0, 3])),
        (third, UniPCMultistepScheduler(**SD, **end, **third)),
        ({"solver": "dpm++"}, DPMSolverMultistepScheduler(**SD, **end)),
        ({"solver": "deis", "solver_options": {"order": 3}}, DEISMultistepScheduler(**SD, **third)),
    ]
    for config, theirs in pairs:
        scheduler = SolverScheduler(**SD, **end, **config)
        scheduler.set_timesteps(7)
        theirs.set_timesteps(7)
        theirs.sigmas = scheduler.sigmas.double()
        results = []
        for each in (scheduler, theirs):
            each.set_begin_index(begin)
            results.append(finish(each, start(), begin))
        torch.testing.assert_close(*results, rtol=0, atol=2e-5)


@pytest.mark.law
@pytest.mark.parametrize("begin", range(1, 6))
def test_a_late_start_of_a_stored_schedule_is_its_tail_run_cold(begin: int) -> None:
    for make, options in ((presets.ipndm, {}), (presets.deis, {"order": 3})):
        scheduler = SolverScheduler(**SD, schedules=make(6, final="sigma_min", **options))
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        late = finish(scheduler, start(), begin)
        nodes = Nodes(kind="sigmas", values=tuple(scheduler.sigmas.double().tolist()[begin:]))
        tail = SolverScheduler(**SD, schedules=make(6 - begin, nodes, **options))
        tail.set_timesteps(6 - begin)
        x = start()
        for i, t in enumerate(tail.timesteps):
            x = tail.step(noise_of(x, i + begin), t, x).prev_sample
        torch.testing.assert_close(late, x, rtol=0, atol=1e-12)


@pytest.mark.law
def test_a_finished_run_says_so_and_a_foreign_timestep_is_refused() -> None:
    scheduler = SolverScheduler(**SD)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(start(), 999, start())
    run(scheduler)
    with pytest.raises(ValueError, match="all 6 steps are done"):
        scheduler.step(start(), scheduler.timesteps[-1], start())
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 321 is not on the grid"):
        scheduler.step(start(), 321, start())


@pytest.mark.law
def test_half_precision_adds_up_in_single() -> None:
    scheduler = SolverScheduler(**SD, solver_order=3)
    wanted = run(scheduler)
    for dtype in (torch.float16, torch.bfloat16):
        got = run(scheduler, dtype)
        assert got.dtype == dtype and scheduler.model_outputs[-1].dtype == torch.float32
        assert float((got.double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.law
def test_thresholding_bounds_every_stored_prediction() -> None:
    scheduler = SolverScheduler(**SD, thresholding=True, sample_max_value=1.0)
    scheduler.set_timesteps(6)
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(3 * noise_of(x, i), t, x).prev_sample
        assert float(scheduler.model_outputs[-1].abs().max()) <= 1.0 + 1e-12


@pytest.mark.law
def test_network_time_offsets_change_what_the_network_is_told_only() -> None:
    from dataclasses import replace

    plain = presets.ddim(4)
    shifted = replace(plain, time_shift=(0.0, -3.5, 2.0, 1.0))
    one, two = SolverScheduler(**SD, schedules=plain), SolverScheduler(**SD, schedules=shifted)
    one.set_timesteps(4)
    two.set_timesteps(4)
    assert (two.timesteps - one.timesteps).tolist() == [0.0, -3.5, 2.0, 1.0]
    assert torch.equal(one.sigmas, two.sigmas)


@pytest.mark.law
def test_the_gaussian_is_sampled_alike_from_every_prediction_type() -> None:
    network = GaussianModel(mean=torch.zeros(3, 4, 4, dtype=torch.float64), variance=0.3)
    results = []
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = SolverScheduler(**SD, solver_order=3, prediction_type=kind)
        scheduler.set_timesteps(6)
        x = start()
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler, x, t), t, x).prev_sample
        results.append(x)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.contract
def test_diffusers_can_load_a_saved_pipeline_that_names_this_class() -> None:
    import diffplug.samplers.solver.scheduler as module

    assert hasattr(module, "SchedulerMixin")
    assert SolverScheduler.__module__ == module.__name__ == "diffplug.samplers.solver.scheduler"


@pytest.mark.law
def test_a_state_that_was_changed_outside_is_not_corrected() -> None:
    """Who replaces x between two steps says so by last_sample = None, as with Diffusers' UniPC."""
    ends = []
    for scheduler in (SolverScheduler(**SD), UniPCMultistepScheduler(**SD)):
        scheduler.set_timesteps(6)
        x = finish(scheduler, start(), stop=3)
        assert scheduler.last_sample is not None
        scheduler.last_sample = None
        ends.append(finish(scheduler, x + 0.1 * start().flip(0), begin=3))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)
