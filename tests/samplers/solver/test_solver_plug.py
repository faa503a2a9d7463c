"""Solver, the plug: the entry for the steps and guidance of a call, and an exact way back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffplug.plug import plug
from diffplug.samplers import Solver, SolverScheduler
from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.testing import tiny


def picture(pipe: Any, steps: int, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    result = pipe(
        "a red circle", num_inference_steps=steps, generator=generator, output_type="latent", **call
    )
    return torch.as_tensor(result.images)


def at(guidance: float, schedule: SolverSchedule) -> SolverSchedule:
    return replace(schedule, meta={"guidance_scale": guidance})


@pytest.mark.pipe
def test_the_entry_of_the_steps_and_guidance_is_taken(tmp_path: Path) -> None:
    pipe = tiny("sd15")
    old, config, before = pipe.scheduler, dict(pipe.config), picture(pipe, 3)
    presets.ipndm(2).save(tmp_path / "two.json")
    entries = [at(5.0, presets.ddim(3)), at(7.5, presets.dpmpp(3, "karras")), tmp_path / "two.json"]
    with plug(pipe, Solver(entries)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(pipe.scheduler).__name__ == "SolverScheduler" and isinstance(
            pipe.scheduler, SolverScheduler
        )
        assert torch.equal(pipe.scheduler.alphas_cumprod, old.alphas_cumprod)
        results = [picture(pipe, 3, guidance_scale=g) for g in (5.0, 7.5)] + [picture(pipe, 2)]
        assert all(bool(x.isfinite().all()) for x in results)
        assert not torch.equal(results[0], results[1])
        with pytest.raises(ValueError, match="schedules are for 2, 3 steps, the pipeline asked for 4"):
            picture(pipe, 4)
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="made at guidance 5, the pipeline runs at 5.5"):
            picture(pipe, 3, guidance_scale=5.5)
    assert pipe.scheduler is old and dict(pipe.config) == config
    assert torch.equal(picture(pipe, 3), before)


@pytest.mark.pipe
def test_a_named_preset_serves_the_other_steps_with_a_warning() -> None:
    pipe = tiny("sd15")
    warned = pytest.warns(UserWarning, match=r"no schedule has 2 steps \(there are 3\): 'ipndm' is used")
    with plug(pipe, Solver(presets.ddim(3), solver="ipndm", grid="log-snr")), warned:
        assert bool(picture(pipe, 2).isfinite().all())
    with plug(pipe, Solver(solver="deis")):
        assert pipe.scheduler.config.schedules is None
        assert bool(picture(pipe, 2).isfinite().all())


@pytest.mark.pipe
def test_flow_pipelines_run_schedules_and_presets() -> None:
    pipe = tiny("sd3")
    old = pipe.scheduler
    with plug(pipe, Solver(presets.unipc(3, "bong_tangent"), solver="res_multistep")):
        config = pipe.scheduler.config
        assert config.use_flow_sigmas and config.prediction_type == "flow_prediction"
        assert bool(picture(pipe, 3).isfinite().all())
        assert pipe.scheduler.timesteps.dtype == torch.float32
    assert pipe.scheduler is old


@pytest.mark.pipe
def test_an_analytic_first_step_saves_an_evaluation() -> None:
    pipe = tiny("sd15")
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with plug(pipe, Solver(replace(presets.unipc(4, "log-snr"), first="zero_x0"))):
        assert bool(picture(pipe, 3).isfinite().all())
    hook.remove()
    assert len(calls) == 3


@pytest.mark.law
def test_bad_plugs_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'solver_order'"):
        Solver(solver_ordre=2)
    with pytest.raises(ValueError, match="two schedules are for 3 steps at guidance None"):
        Solver([presets.ddim(3), presets.ipndm(3)])
    with pytest.raises(ValueError, match="no solver schedule"):
        Solver({"format": "other"})
    with pytest.raises(ValueError, match="Did you mean 'ipndm'"):
        Solver(solver="ipdm")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json' is not valid JSON"):
        Solver(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="no scheduler"):
        Solver(presets.ddim(3)).attach(object())
