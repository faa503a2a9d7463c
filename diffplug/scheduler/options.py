"""What becomes of every option of a scheduler when another class takes its place: one table, as data.

A pipeline's own scheduler tells the model's noise, what the network predicts and where runs lie, under names
that may mean something else in the class that replaces it, or nothing. Every option of every scheduler of
Diffusers has a kind here; `handed_on` is the only place that reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

__all__ = ["ALONE", "KINDS", "OPTIONS", "handed_on", "kind_of"]

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "model": "belongs to the model: handed on under its name, also where it was left at its default",
        "flow": "belongs to a flow model: handed on under the name that the other class has for it",
        "run": "where steps lie and how runs end: handed on to classes that have the name",
        "flow grid": "as run, but of a flow model's own formula: handed on to flow classes and to ours alone",
        "solver": "a decision of the replaced solver: handed on where the name means the same",
        "own": "a decision of the replaced solver alone: of no concern to another",
        "alone": "changes the model's runs as no other class can: refused unless it is neutral",
        "pipeline": "read by pipelines from whatever scheduler they have: kept in the configuration",
    }
)

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        # the model
        "num_train_timesteps": "model",
        "beta_start": "model",
        "beta_end": "model",
        "beta_schedule": "model",
        "trained_betas": "model",
        "rescale_betas_zero_snr": "model",
        "snr_shift_scale": "own",  # its effect on the noise levels is handed on as trained_betas
        "prediction_type": "model",
        "sigma_data": "model",
        "clip_sample": "model",
        "clip_sample_range": "model",
        "thresholding": "model",
        "dynamic_thresholding_ratio": "model",
        "sample_max_value": "model",
        "timestep_type": "model",  # continuous models are a world of their own
        # flow models
        "use_flow_sigmas": "flow",
        "flow_shift": "flow",
        "shift": "flow",
        "use_dynamic_shifting": "run",
        "time_shift_type": "run",
        "shift_terminal": "run",
        # where steps lie
        "timestep_spacing": "run",
        "steps_offset": "run",
        "use_karras_sigmas": "run",
        "use_exponential_sigmas": "run",
        "use_beta_sigmas": "run",
        "sigma_min": "run",
        "sigma_max": "run",
        "sigma_schedule": "run",
        "rho": "run",
        "final_sigmas_type": "run",
        "set_alpha_to_one": "run",
        "lambda_min_clipped": "own",
        # the solver
        "solver_order": "solver",
        "lower_order_final": "solver",
        "solver_type": "solver",
        "algorithm_type": "solver",
        "euler_at_final": "solver",
        "predict_x0": "solver",
        "disable_corrector": "solver",
        "solver_p": "own",
        "predictor_order": "own",
        "corrector_order": "own",
        "tau_func": "own",
        "eta": "own",
        "s_noise": "own",
        "noise_sampler_seed": "own",
        "stochastic_sampling": "own",
        "skip_prk_steps": "own",
        "original_inference_steps": "own",
        "timestep_scaling": "own",
        "clip_denoised": "own",
        # what no other class can do
        "invert_sigmas": "own",  # refused where the model's direction differs
        "use_lu_lambdas": "alone",
        "interpolation_type": "alone",
        "scale_factors": "alone",
        "upscale_mode": "own",  # does nothing without scale_factors
        # what pipelines read
        "base_shift": "pipeline",
        "max_shift": "pipeline",
        "base_image_seq_len": "pipeline",
        "max_image_seq_len": "pipeline",
        "variance_type": "pipeline",
    }
)  # fmt: skip

FLOW_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
EXCEPTIONS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (name, option): "flow grid"
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
        for option in FLOW_GRIDS
    }
)

ALONE: frozenset[str] = frozenset(
    {
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "CMStochasticIterativeScheduler",
        "DDPMWuerstchenScheduler",
        "DDIMInverseScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "FlowMapEulerDiscreteScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "KarrasVeScheduler",
        "MiniMaxH3Scheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "VQDiffusionScheduler",
    }
)
"""Schedulers of models that no other class can run (tokens, inversions, consistency)."""

_NEUTRAL: Mapping[str, Any] = MappingProxyType({"interpolation_type": "linear"})
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "use_lu_lambdas": "set it to False, or plug diffplug.samplers.Solver(grid='log-snr')",
        "interpolation_type": "set it to 'linear', or plug diffplug.samplers.Solver(grid='log-snr')",
        "flow grid": "set it to False, or plug diffplug.samplers.Solver, which has these grids",
    }
)
_DPM = frozenset({"DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"})
_DDPM = frozenset({"DDPMScheduler", "DDPMParallelScheduler"})
_OF_FEW: Mapping[str, tuple[frozenset[str], ...]] = MappingProxyType(
    {"solver_type": (_DPM,), "algorithm_type": (_DPM,), "variance_type": (_DDPM,)}
)
"""Options whose values are those of a few classes: between others they are not handed on."""


def kind_of(source: str, option: str) -> str | None:
    """Return the kind (see `KINDS`) of an option of a scheduler class, None for one that nobody has met."""
    return EXCEPTIONS.get((source, option), OPTIONS.get(option))


def handed_on(
    cls: Any, config: Mapping[str, Any], source: type, decided: Collection[str] = ()
) -> dict[str, Any]:
    """Return the options with which `cls` takes the place of a scheduler with this configuration.

    config: of the replaced scheduler, of class `source`. decided: options that the caller gives, or that what
    is given makes idle: their loss is no loss. Raises ValueError for an option that no other class can take
    over.
    """
    takes, defaults = inspect.signature(cls).parameters, config.get("_use_default_values", ())
    found: dict[str, Any] = {name: value for name, value in config.items() if name.startswith("_")}
    for name, value in config.items():
        kind = _kind_in(config, source, name)
        if name.startswith("_") or (name in defaults and kind != "model"):
            continue
        if name in decided and kind in ("alone", "flow grid"):
            continue
        if _goes_over(cls, source, name, kind, value) and name in takes:
            found[name] = value
    found["_use_default_values"] = [name for name in defaults if name not in found]
    return found


def _goes_over(cls: type, source: type, name: str, kind: str | None, value: Any) -> bool:
    """Return whether an option keeps its meaning in another class; ValueError where it must not be lost."""
    origin, target = ancestor(source).__name__, ancestor(cls).__name__
    if not value or value == _NEUTRAL.get(name):
        return kind not in ("own", "flow", "flow grid") or origin == target
    if kind == "flow grid" and _flow_grids_of(cls) != _flow_grids_of(source):
        raise _lost(cls, origin, name, value, kind)
    if kind == "alone" and name not in inspect.signature(cls).parameters:
        raise _lost(cls, origin, name, value, name)
    if name in _OF_FEW and origin != target:
        return any({origin, target} <= classes for classes in _OF_FEW[name])
    return origin == target or kind not in ("own", "flow")


def _kind_in(config: Mapping[str, Any], source: type, name: str) -> str | None:
    """Return the kind of an option; solvers with flow sigmas make these grids by formulas of their own."""
    kind = kind_of(ancestor(source).__name__, name)
    return "flow grid" if name in FLOW_GRIDS and config.get("use_flow_sigmas") else kind


def _flow_grids_of(cls: type) -> str:
    """Return whose formula the grids of a flow model follow in a class."""
    name = ancestor(cls).__name__
    matching = getattr(cls, "has_flow_grids", False) or (name, "use_karras_sigmas") in EXCEPTIONS
    return "flow matching" if matching else name


def _lost(cls: type, origin: str, name: str, value: Any, why: str) -> ValueError:
    instead = _INSTEAD.get(why, "keep the pipeline's own scheduler")
    return ValueError(f"{name}={value!r} of {origin} has no equal in {cls.__name__}: {instead}")


@cache
def ancestor(cls: type) -> type:
    """Return the nearest class of Diffusers that a class derives from, or itself."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("diffusers.")), cls)
