"""Schedulers whose state is x0 + sigma eps (the Euler family, EDM, consistency models), and iPNDM."""

from __future__ import annotations

import math
from typing import Any

from diffplug.noise.gaussian_step import NormalForm, ancestral_form, sigma_pair, with_advice
from diffplug.noise.noise_level import Level
from diffplug.noise.position import StepPosition, base_name, host
from diffplug.noise.prediction import Bound, prediction_mix


def ve_here(scheduler: Any, at: StepPosition) -> Level:
    """Return Level(1, sigma) of the sample, between the stages of a two-stage step too."""
    return Level(1.0, _stage_sigma(scheduler, at.index(scheduler), _first_stage(scheduler, at)))


def ve_there(scheduler: Any, at: StepPosition) -> Level:
    """Return Level(1, sigma) of the sample this call gives back, after a first stage the mid-step one."""
    return Level(1.0, _stage_sigma(scheduler, at.index(scheduler) + 1, not _first_stage(scheduler, at)))


def _first_stage(scheduler: Any, at: StepPosition) -> bool:
    """Return whether a call at ``at`` begins a step; always true for schedulers with one stage."""
    if getattr(scheduler, "order", 1) == 1:
        return True
    if at.fixed is not None:
        return at.fixed % 2 == 0
    return bool(getattr(scheduler, "state_in_first_order", True))


_MIDPOINT = frozenset({"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"})


def _stage_sigma(scheduler: Any, i: int, first: bool) -> float:
    """Return the noise of the sample at index ``i``; at second stages of midpoint solvers it lies between."""
    name = base_name(scheduler, _MIDPOINT)
    if first or not name or i >= len(scheduler.sigmas) - 1:
        return host(scheduler.sigmas, i)
    if name == "DPMSolverSDEScheduler":
        return math.sqrt(host(scheduler.sigmas, i - 1) * host(scheduler.sigmas, i))
    return host(scheduler.sigmas_interpol, i if name == "KDPM2DiscreteScheduler" else i - 1)


def sigma_here(scheduler: Any, at: StepPosition) -> Level:
    """Return Level(1, sigma) at the step index of ``at``."""
    return Level(1.0, host(scheduler.sigmas, at.index(scheduler)))


def sigma_there(scheduler: Any, at: StepPosition) -> Level:
    """Return Level(1, sigma) one entry further."""
    return Level(1.0, host(scheduler.sigmas, at.index(scheduler) + 1))


def jump_there(scheduler: Any, at: StepPosition) -> Level:
    """Return the level a consistency model re-noises to: its next sigma less the smallest, in quadrature."""
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    sigma = min(max(host(scheduler.sigmas, at.index(scheduler) + 1), low), high)
    return Level(1.0, scheduler.config.s_noise * math.sqrt(sigma * sigma - low * low))


def ipndm_here(scheduler: Any, at: StepPosition) -> Level:
    """Return the stored pair alphas, betas (their squares sum to 1) at ``at``."""
    i = at.index(scheduler)
    return Level(host(scheduler.alphas, i), host(scheduler.betas, i))


def ipndm_there(scheduler: Any, at: StepPosition) -> Level:
    """Return the stored pair one entry further."""
    i = at.index(scheduler) + 1
    return Level(host(scheduler.alphas, i), host(scheduler.betas, i))


def ipndm_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return (keep, gain) of iPNDM, whose networks predict the velocity."""
    return prediction_mix("v_prediction", at)


def edm_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return (c_skip, c_out) of EDM preconditioning (arXiv 2206.00364, table 1); v flips c_out's sign."""
    data, kind = scheduler.config.sigma_data, scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {kind!r} is unknown here: allowed are epsilon and v_prediction")
    norm = at.sigma**2 + data**2
    gain = at.sigma * data / math.sqrt(norm)
    return data**2 / norm, gain if kind == "epsilon" else -gain


def jump_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return the boundary-condition scalings of a consistency model (arXiv 2303.01469, appendix C)."""
    data, rest = scheduler.config.sigma_data, at.sigma - scheduler.config.sigma_min
    return data**2 / (rest**2 + data**2), rest * data / math.sqrt(at.sigma**2 + data**2)


def jump_bound(scheduler: Any) -> Bound | None:
    """Return clipping to [-1, 1] where a consistency model asks for it."""
    return (lambda x0: x0.clamp(-1, 1)) if scheduler.config.clip_denoised else None


def euler_step(scheduler: Any, at: StepPosition) -> NormalForm:
    here, there = sigma_pair(scheduler, at)
    return NormalForm(a=1.0 - there / here, b=there / here, s=0.0, advice="EulerAncestralDiscreteScheduler")


def euler_ancestral_step(scheduler: Any, at: StepPosition) -> NormalForm:
    here, there = sigma_pair(scheduler, at)
    return with_advice(
        ancestral_form(Level(1.0, here), Level(1.0, there), 1.0), "an earlier step than the last"
    )


def jump_step(scheduler: Any, at: StepPosition) -> NormalForm:
    there = jump_there(scheduler, at)
    s = there.sigma if len(scheduler.timesteps) > 1 else 0.0
    return NormalForm(a=1.0, b=0.0, s=s, advice="num_inference_steps > 1, on a step before the last")
