"""DCSolver, the plug: the pipeline's model, the method's recipe, and an exact way back."""

from __future__ import annotations

import warnings

import pytest
import torch
from dc_runs import NAN, RATIOS, SD
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffplug.plug import plug
from diffplug.samplers import DCSolver, DCSolverScheduler
from diffplug.testing import tiny


@pytest.mark.pipe
def test_the_plug_takes_the_pipelines_noise_and_the_methods_recipe() -> None:
    pipe = tiny("sd15")
    old, config = pipe.scheduler, dict(pipe.config)
    with plug(pipe, DCSolver(RATIOS, dc_variable="lambda")):
        new = pipe.scheduler
        assert type(new) is DCSolverScheduler
        assert new.config.dc_ratios == RATIOS and new.config.dc_variable == "lambda"
        assert new.config.timestep_spacing == "linspace" and new.config.final_sigmas_type == "sigma_min"
        assert torch.equal(new.alphas_cumprod, old.alphas_cumprod)
        with pytest.raises(ValueError, match="for 6 steps, the pipeline asked for 4"):
            pipe("a red circle", num_inference_steps=4, output_type="latent")
        assert (
            torch.as_tensor(pipe("a red circle", num_inference_steps=6, output_type="latent").images)
            .isfinite()
            .all()
        )
    assert pipe.scheduler is old and dict(pipe.config) == config


@pytest.mark.pipe
def test_the_plug_takes_the_shift_of_flow_pipelines() -> None:
    pipe = tiny("sd3")
    old = pipe.scheduler
    assert isinstance(old, FlowMatchEulerDiscreteScheduler)
    undo = DCSolver().attach(pipe)
    config = pipe.scheduler.config
    assert config.use_flow_sigmas and config.prediction_type == "flow_prediction"
    assert config.flow_shift == old.config.shift and config.final_sigmas_type == "zero"
    assert config.use_dynamic_shifting == old.config.use_dynamic_shifting
    undo()
    assert pipe.scheduler is old


@pytest.mark.pipe
def test_the_plug_refuses_what_it_cannot_do() -> None:
    pipe = tiny("sd15")
    with pytest.raises(ValueError, match="did you mean 'solver_order'"):
        DCSolver(solver_ordre=2)
    with pytest.raises(ValueError, match="not a finite number"):
        DCSolver([1, 1, NAN])
    with pytest.raises(ValueError, match="no scheduler"):
        DCSolver().attach(object())
    with pytest.raises(ValueError, match=r"(?s)DCSolver.*DCSolver"):
        plug(pipe, DCSolver(), DCSolver())
    pipe.scheduler = DDIMScheduler(**SD)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**0.5
    with pytest.raises(ValueError, match="noise levels"):
        DCSolver().attach(pipe)


@pytest.mark.law
def test_the_plug_is_a_frozen_value() -> None:
    one = DCSolver(RATIOS)
    assert one == DCSolver(tuple(RATIOS)) and one != DCSolver()
    with pytest.raises(AttributeError):
        one.ratios = None  # type: ignore[misc]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DCSolver.slot == "scheduler"
