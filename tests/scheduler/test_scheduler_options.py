"""Every option of every scheduler of Diffusers: what becomes of it where another class takes its place."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffplug.noise.families import KNOWN
from diffplug.noise.stochastic import stochastic
from diffplug.plug import plug
from diffplug.registry import sampler
from diffplug.samplers import DCSolverScheduler, SolverScheduler
from diffplug.scheduler.calls import scheduler_calls
from diffplug.scheduler.options import ALONE, KINDS, OPTIONS, handed_on, kind_of
from diffplug.scheduler.plug import build
from diffplug.testing import tiny

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def stock() -> dict[str, type]:
    """Every scheduler class of the installed Diffusers."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, SchedulerMixin)}


def options_of(cls: type) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.contract
def test_every_option_of_every_scheduler_has_a_kind() -> None:
    classes = stock()
    known = {name: cls for name, cls in classes.items() if name not in ALONE}
    missing = [f"{k}.{o}" for k, cls in known.items() for o in options_of(cls) if kind_of(k, o) is None]
    assert not missing, f"give these a kind in diffplug.scheduler.options: {missing}"
    assert set(OPTIONS.values()) <= set(KINDS)
    assert not ALONE - set(classes), "these are gone from Diffusers"
    stale = set(OPTIONS) - {option for cls in classes.values() for option in options_of(cls)}
    assert not stale, f"no scheduler has these any more: {stale}"


@pytest.mark.contract
def test_every_scheduler_is_known_or_stands_alone() -> None:
    unknown = set(stock()) - set(KNOWN) - ALONE
    assert not unknown, f"give these a line in diffplug.noise.families.KNOWN, or in ALONE: {unknown}"


@pytest.mark.contract
@pytest.mark.parametrize("target", [SolverScheduler, DCSolverScheduler])
@pytest.mark.parametrize("name", sorted(set(stock()) - ALONE))
def test_every_value_is_handed_on_refused_or_of_no_concern(name: str, target: Any) -> None:
    """Whatever an option is set to: our classes are built, or the sentence names the option."""
    cls: Any = stock()[name]
    for option, other in OTHERS.items():
        if option not in options_of(cls):
            continue
        try:
            config = cls(**{option: other}).config
        except (ValueError, NotImplementedError, TypeError):
            continue  # the class itself does not take it
        try:
            told = handed_on(target, config, cls)
        except ValueError as error:
            assert option in str(error) and "\n" not in str(error)
            continue
        kind = kind_of(name, option)
        if kind in ("model", "run") and option in inspect.signature(target).parameters:
            assert told[option] == other, f"{option} of {name} is lost"


OTHERS: dict[str, Any] = {
    "num_train_timesteps": 500,
    "beta_end": 0.013,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "interpolation_type": "log_linear",
    "final_sigmas_type": "sigma_min",
    "thresholding": True,
    "clip_sample": True,
    "clip_sample_range": 2.0,
    "rescale_betas_zero_snr": True,
    "time_shift_type": "linear",
    "stochastic_sampling": True,
    "euler_at_final": True,
    "sigma_max": 11.0,
    "solver_order": 3,
}


@pytest.mark.pipe
@pytest.mark.parametrize("option", GRIDS)
def test_grids_of_flow_models_are_not_handed_to_classes_that_mean_others(option: str) -> None:
    pipe = tiny("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **{option: True})
    for cls in (UniPCMultistepScheduler, DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler):
        with pytest.raises(
            ValueError, match=f"{option}=True of FlowMatchEuler.* has no equal in {cls.__name__}"
        ):
            plug(pipe, cls)
    with plug(pipe, FlowMatchLCMScheduler):
        assert pipe.scheduler.config[option]
    with plug(pipe, SolverScheduler):
        pipe.scheduler.set_timesteps(4)
        assert float(pipe.scheduler.sigmas.max()) <= 1
    broken = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_exponential_sigmas=True
    )
    with pytest.raises(ValueError, match="sigmas go up to 1.* those of flow models to 1"):
        plug(pipe, broken)


@pytest.mark.pipe
def test_continuous_models_keep_schedulers_that_tell_them_their_noise() -> None:
    for pipe in (tiny("sdxl"), tiny("svd")):
        if type(pipe).__name__ == "StableDiffusionXLPipeline":
            pipe.scheduler = EulerDiscreteScheduler(
                **BETAS, prediction_type="v_prediction", timestep_type="continuous", sigma_max=120.0,
                sigma_min=0.002, use_karras_sigmas=True,
            )  # fmt: skip
        for cls in (SolverScheduler, DCSolverScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
            with pytest.raises(ValueError, match="for continuous noise levels .timestep_type='continuous'"):
                plug(pipe, cls)
        with plug(pipe, EulerDiscreteScheduler):
            assert pipe.scheduler.config.timestep_type == "continuous"
        with pytest.raises(ValueError, match="steer with churn"):
            stochastic(pipe.scheduler)


@pytest.mark.pipe
def test_preconditioned_models_are_a_world_of_their_own() -> None:
    pipe = tiny("sdxl")
    pipe.scheduler = diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_max=120.0)
    for cls in (SolverScheduler, DCSolverScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
        with pytest.raises(ValueError, match="is for noise prediction, but .* is for edm models"):
            plug(pipe, cls)
    with plug(pipe, diffusers.EDMDPMSolverMultistepScheduler):
        pipe(**tiny.inputs("sdxl"))


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["consistency", "sana-sprint"])
def test_models_that_one_scheduler_alone_runs_keep_it(name: str) -> None:
    pipe = tiny(name)
    for cls in (SolverScheduler, UniPCMultistepScheduler):
        with pytest.raises(ValueError, match=f"no other scheduler runs the model of {type(pipe).__name__}"):
            plug(pipe, cls)


@pytest.mark.pipe
def test_noise_levels_by_a_formula_of_their_own_are_handed_on() -> None:
    pipe = tiny("cogvideox")
    trained = pipe.scheduler.alphas_cumprod
    assert isinstance(pipe.scheduler, CogVideoXDDIMScheduler)
    for cls in (SolverScheduler, UniPCMultistepScheduler, DDIMScheduler):
        built = build(cls, pipe)
        torch.testing.assert_close(built.alphas_cumprod, trained, rtol=1e-3, atol=1e-6, check_dtype=False)
    pipe = tiny("ddpm")
    pipe.scheduler = DDPMScheduler(beta_schedule="sigmoid")  # which UniPC does not know
    built = build(SolverScheduler, pipe)
    wanted = pipe.scheduler.alphas_cumprod
    torch.testing.assert_close(built.alphas_cumprod, wanted, rtol=1e-3, atol=1e-6, check_dtype=False)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**0.5
    for one in (SolverScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        with pytest.raises(
            ValueError, match="noise levels that its configuration does not tell|does not fit"
        ):
            plug(pipe, one)


@pytest.mark.pipe
def test_clean_predictions_are_clipped_as_the_model_was() -> None:
    pipe = tiny("ddpm")
    pipe.scheduler = DDPMScheduler(clip_sample=True, clip_sample_range=0.5)
    with plug(pipe, SolverScheduler):
        new = pipe.scheduler
        assert (new.config.clip_sample, new.config.clip_sample_range) == (True, 0.5)
        new.set_timesteps(1)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        assert float(new.step(10 * x, new.timesteps[0], x).prev_sample.abs().max()) <= 0.5


@pytest.mark.law
def test_values_that_mean_something_in_a_few_classes_stay_there() -> None:
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type="heun", **BETAS).config
    assert (
        handed_on(diffusers.DPMSolverSinglestepScheduler, sde, DPMSolverMultistepScheduler)["solver_type"]
        == "heun"
    )
    for cls in (SASolverScheduler, DEISMultistepScheduler, UniPCMultistepScheduler):
        told = handed_on(cls, sde, DPMSolverMultistepScheduler)
        assert not {"solver_type", "algorithm_type"} & set(told)
        cls.from_config(told)


@pytest.mark.pipe
def test_what_a_pipeline_gives_and_calls_is_checked_on_attaching() -> None:
    assert {"eta", "use_clipped_model_output"} <= scheduler_calls(diffusers.DDIMPipeline).step
    assert "scale_noise" in scheduler_calls(diffusers.FluxImg2ImgPipeline).methods
    assert "sigmas" in scheduler_calls(diffusers.QwenImagePipeline).timesteps
    assert scheduler_calls(int).step == frozenset()
    for name, cls, said in (
        ("ddim", UniPCMultistepScheduler, "the pipeline gives its step eta"),
        ("flux-img2img", UniPCMultistepScheduler, "the pipeline calls its scale_noise"),
        ("qwenimage", DPMSolverMultistepScheduler, "set_timesteps does not take sigmas"),
        ("flux-schnell", DPMSolverMultistepScheduler, "shifts by mu"),
        ("lcm", DDIMScheduler, "original_inference_steps"),
    ):
        with pytest.raises(ValueError, match=said):
            plug(tiny(name), cls)
    with plug(tiny("lcm"), LCMScheduler):
        pass


@pytest.mark.pipe
def test_a_grid_that_would_be_lost_is_refused_by_name() -> None:
    pipe = tiny("flux")
    call = {k: v for k, v in tiny.inputs("flux").items() if k != "num_inference_steps"}
    with plug(pipe, UniPCMultistepScheduler):
        with pytest.raises(ValueError, match="sigmas= would do nothing: with UniPCMultistepScheduler"):
            pipe(**call, sigmas=[1.0, 0.5])
        pipe(**tiny.inputs("flux"))


@pytest.mark.pipe
def test_names_with_options_are_translated_too() -> None:
    pipe = tiny("flux")
    with plug(pipe, sampler("dpm++-sde", pipe)):
        config = pipe.scheduler.config
        assert config.algorithm_type == "sde-dpmsolver++" and config.use_flow_sigmas
        pipe(**tiny.inputs("flux", num_inference_steps=3))
    pipe = tiny("sdxl")
    with plug(pipe, sampler("pndm", pipe)):
        pipe(**tiny.inputs("sdxl", num_inference_steps=3))
        assert len(pipe.scheduler.timesteps) == 4


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["deepfloyd-if", "kandinsky22", "dit"])
def test_learned_variances_are_left_to_the_pipeline(name: str) -> None:
    pipe = tiny(name)
    for cls in (SolverScheduler, DPMSolverMultistepScheduler):
        with plug(pipe, cls):
            assert pipe.scheduler.config.get("variance_type") is None
            pipe(**tiny.inputs(name))
