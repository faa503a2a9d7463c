"""Schedulers with a table of cumulative products, read by timestep: DDIM, DDPM, PNDM, LCM, TCD and kin."""

from __future__ import annotations

import math
from typing import Any

import torch

from diffplug.noise.gaussian_step import NormalForm, ancestral_form, bridge
from diffplug.noise.noise_level import CLEAN, Level
from diffplug.noise.position import StepPosition, base_name, find, host
from diffplug.noise.prediction import Bound, config_bound


def vp(abar: float) -> Level:
    """Return the variance-preserving level sqrt(abar), sqrt(1 - abar) of a cumulative product."""
    return Level(math.sqrt(abar), math.sqrt(max(1.0 - abar, 0.0)))


def table_level(scheduler: Any, timestep: int) -> Level:
    """Return the level at an integer training timestep; below 0 it is the level the scheduler ends at."""
    if timestep >= 0:
        return vp(host(scheduler.alphas_cumprod, timestep))
    end = getattr(scheduler, "final_alpha_cumprod", None)
    return CLEAN if end is None else vp(float(end))


LISTED = frozenset(
    {"DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "TCDScheduler", "ListedDDIMScheduler"}
)


_SPECIAL = LISTED | {"PNDMScheduler", "UnCLIPScheduler"}


def next_timestep(scheduler: Any, at: StepPosition) -> int:
    """Return the training timestep that a step from ``at`` leads to, below 0 at the end of the schedule.

    LCM and TCD give it only for the steps they take on their list: 0 and below for the last one.
    """
    t, name = at.train_timestep(scheduler), base_name(scheduler, _SPECIAL)
    if name in LISTED:
        return _next_listed(scheduler, at, name, t)
    if name == "UnCLIPScheduler":
        return t - 1
    if name == "PNDMScheduler":
        return _next_pndm(scheduler, t, scheduler.counter if at.fixed is None else at.fixed)
    if not scheduler.num_inference_steps:
        raise ValueError(f"{type(scheduler).__name__} has no steps yet: call set_timesteps first")
    return t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def _next_pndm(scheduler: Any, t: int, call: int) -> int:
    """Return where PNDM's ``call`` leads: Runge-Kutta half a stride, linear a stride, the second none."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if scheduler.config.skip_prk_steps:
        return t if call == 1 else t - stride
    if call < len(scheduler.prk_timesteps):
        return t if call % 2 else t - stride // 2
    return t - stride


def _next_listed(scheduler: Any, at: StepPosition, name: str, t: int) -> int:
    """Return the following timestep of the list, as DDPM (by value), LCM and TCD (by counter) find it."""
    by_value = name.startswith("DDPM")
    if by_value and not (scheduler.custom_timesteps or scheduler.num_inference_steps):
        return t - 1
    i = find(scheduler, t) if by_value and at.fixed is None else at.index(scheduler)
    if i + 1 < len(scheduler.timesteps):
        return int(host(scheduler.timesteps, i + 1))
    return 0 if name == "TCDScheduler" else -1


def table_here(scheduler: Any, at: StepPosition) -> Level:
    """Return the level of the sample at the timestep of ``at``."""
    return table_level(scheduler, at.train_timestep(scheduler))


def table_there(scheduler: Any, at: StepPosition) -> Level:
    """Return the level the step leads to; LCM gives back its clean prediction at the end."""
    t = next_timestep(scheduler, at)
    return CLEAN if t < 0 and base_name(scheduler, LISTED) == "LCMScheduler" else table_level(scheduler, t)


_UNCLIPPED = frozenset({"TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"})


def table_bound(scheduler: Any) -> Bound | None:
    """Return the configured bound, but None for TCD and CogVideoX, whose steps ignore that setting."""
    return None if base_name(scheduler, _UNCLIPPED) else config_bound(scheduler)


def ddim_step(
    scheduler: Any, at: StepPosition, *, eta: float = 0.0, use_clipped_model_output: bool = False
) -> NormalForm:
    here, there = table_here(scheduler, at), table_there(scheduler, at)
    form = ancestral_form(here, there, eta)
    slack = 0.0 if use_clipped_model_output else form.b * here.alpha
    advice = "eta > 0 in scheduler.step" if eta == 0 else "an earlier step than the last"
    return NormalForm(a=form.a, b=form.b, s=form.s, slack=slack, advice=advice)


def ddpm_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return ancestral DDPM (arXiv 2006.11239, eq. 7); the last step has no noise."""
    kind = getattr(scheduler, "variance_type", scheduler.config.variance_type)
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(
            f"variance_type={kind!r} gives no single standard deviation: "
            "set variance_type='fixed_small' or 'fixed_large'"
        )
    t, s = at.train_timestep(scheduler), next_timestep(scheduler, at)
    abar = host(scheduler.alphas_cumprod, t)
    abar_s = host(scheduler.alphas_cumprod, s) if s >= 0 else 1.0
    beta = 1.0 - abar / abar_s
    a = math.sqrt(abar_s) * beta / (1.0 - abar)
    b = math.sqrt(abar / abar_s) * (1.0 - abar_s) / (1.0 - abar)
    width = beta if kind == "fixed_large" else beta * (1.0 - abar_s) / (1.0 - abar)
    return NormalForm(
        a=a, b=b, s=math.sqrt(max(width, 0.0)) if t > 0 else 0.0, advice="an earlier step than the last"
    )


def lcm_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return denoising with the boundary scalings, then noise (latent consistency, arXiv 2310.04378)."""
    t, i = at.train_timestep(scheduler), at.index(scheduler)
    scaled = t * scheduler.config.timestep_scaling
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    if i == scheduler.num_inference_steps - 1:
        return NormalForm(
            a=out, b=skip, s=0.0, advice="an earlier step than the last (num_inference_steps > 1)"
        )
    s = int(host(scheduler.timesteps, i + 1)) if i + 1 < len(scheduler.timesteps) else t
    there = table_level(scheduler, s)
    return NormalForm(a=there.alpha * out, b=there.alpha * skip, s=there.sigma)


def tcd_step(scheduler: Any, at: StepPosition, *, eta: float = 0.3) -> NormalForm:
    """Return DDIM to u = floor((1 - eta) s), then noise to s (trajectory consistency, arXiv 2402.19159)."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, allowed is 0 to 1 (TCD's gamma)")
    i, s = at.index(scheduler), next_timestep(scheduler, at)
    u = int(torch.floor((1 - eta) * torch.tensor(s)))  # the scheduler's own float32 product decides the floor
    here, under, there = table_here(scheduler, at), table_level(scheduler, u), table_level(scheduler, s)
    a, b = bridge(here, under, 0.0)
    if eta == 0 or i == scheduler.num_inference_steps - 1:
        return NormalForm(a=a, b=b, s=0.0, advice="eta > 0 in scheduler.step, on a step before the last")
    r = there.alpha / under.alpha
    noise = math.sqrt(max(1.0 - r * r, 0.0))
    return NormalForm(
        a=r * a, b=r * b, s=noise, advice="a larger eta in scheduler.step (floor((1-eta)s) equals s)"
    )
