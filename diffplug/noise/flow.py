"""Flow-matching schedulers, x = (1 - s) x0 + s eps, and SCM, which counts angles."""

from __future__ import annotations

import math
from typing import Any

from diffplug.noise.gaussian_step import NormalForm, ancestral_form, sigma_pair, with_advice
from diffplug.noise.noise_level import Level
from diffplug.noise.position import StepPosition, host
from diffplug.noise.prediction import prediction_mix


def flow_level(scheduler: Any, sigma: float) -> Level:
    """Return the level 1 - sigma, sigma of a straight-line flow; inverted schedules store the signal."""
    rest = max(1.0 - sigma, 0.0)  # shifted float32 schedules may start a rounding above 1
    return Level(sigma, rest) if scheduler.config.get("invert_sigmas") else Level(rest, sigma)


def flow_here(scheduler: Any, at: StepPosition) -> Level:
    """Return the level at the step index of ``at``."""
    return flow_level(scheduler, host(scheduler.sigmas, at.index(scheduler)))


def flow_there(scheduler: Any, at: StepPosition) -> Level:
    """Return the level one entry further."""
    return flow_level(scheduler, host(scheduler.sigmas, at.index(scheduler) + 1))


def _angle_level(scheduler: Any, i: int) -> Level:
    angle = host(scheduler.timesteps, i)
    return Level(max(math.cos(angle), 0.0), math.sin(angle) * scheduler.config.sigma_data)


def angle_here(scheduler: Any, at: StepPosition) -> Level:
    """Return cos, sin * sigma_data of the angle at ``at`` (TrigFlow, arXiv 2410.11081)."""
    return _angle_level(scheduler, at.index(scheduler))


def angle_there(scheduler: Any, at: StepPosition) -> Level:
    """Return cos, sin * sigma_data of the next angle."""
    return _angle_level(scheduler, at.index(scheduler) + 1)


def flow_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return (keep, gain) of a flow: x0 = x - sigma v; inverted schedules integrate the opposite velocity."""
    keep, gain = prediction_mix("flow_prediction", at)
    return keep, -gain if scheduler.config.get("invert_sigmas") else gain


def angle_mix(scheduler: Any, at: Level) -> tuple[float, float]:
    """Return (cos, -sin) of TrigFlow (arXiv 2410.11081)."""
    return at.alpha, -at.sigma / scheduler.config.sigma_data


def flow_euler_step(scheduler: Any, at: StepPosition) -> NormalForm:
    if not scheduler.config.get("stochastic_sampling", False):
        here, there = _flow_pair(scheduler, at)
        return with_advice(
            ancestral_form(here, there, 0.0), "stochastic_sampling=True in the scheduler's config"
        )
    return flow_renoise_step(scheduler, at)


def flow_renoise_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return x0hat noised again to the next level, the step of stochastic flow Euler and flow LCM."""
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} re-noises in the wrong direction with invert_sigmas=True: unset it"
        )
    if getattr(scheduler, "_scale_factors", None):
        raise ValueError(
            "scale_factors change the size of the sample within a step: no transition, unset them"
        )
    there = _flow_pair(scheduler, at)[1]
    return NormalForm(a=there.alpha, b=0.0, s=there.sigma, advice="an earlier step than the last")


def _flow_pair(scheduler: Any, at: StepPosition) -> tuple[Level, Level]:
    here, there = sigma_pair(scheduler, at)
    return flow_level(scheduler, here), flow_level(scheduler, there)


def flow_ancestral_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return LTX's ancestral step of a flow: down below the next level, rescaled, and noised up to it."""
    here, there = sigma_pair(scheduler, at)
    eta, s_noise = float(scheduler.config.eta), float(scheduler.config.s_noise)
    if there < 1e-8:
        return NormalForm(a=1.0, b=0.0, s=0.0, advice="an earlier step than the last")
    down = there * (1.0 + (there / here - 1.0) * eta)
    a, b, s = 1.0 - down / here, down / here, 0.0
    if eta > 0 and s_noise > 0:
        lift = (1.0 - there) / (1.0 - down)
        s = s_noise * math.sqrt(max(there**2 - (down * lift) ** 2, 0.0))
        a, b = a * lift, b * lift
    return NormalForm(a=a, b=b, s=s, advice="eta > 0 in the scheduler's config")


def flow_tcd_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return the step to (1 - eta) times the next level, noised up to it (trajectory consistency, flow)."""
    eta = float(scheduler.config.eta)
    here, there = sigma_pair(scheduler, at)
    down = (1.0 - eta) * there
    lift = 1.0 if down == there else (1.0 - there) / (1.0 - down)
    s = math.sqrt(max(there**2 - (down * lift) ** 2, 0.0))
    return NormalForm(
        a=lift * (1.0 - down / here), b=lift * down / here, s=s, advice="eta > 0 in the scheduler's config"
    )


def angle_step(scheduler: Any, at: StepPosition) -> NormalForm:
    angle = host(scheduler.timesteps, at.index(scheduler) + 1)
    noise = math.sin(angle) * scheduler.config.sigma_data
    return NormalForm(a=math.cos(angle), b=0.0, s=noise, advice="an earlier step than the last")
