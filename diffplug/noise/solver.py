"""Multistep solvers that store sigma / alpha, or a flow sigma: DPM-Solver, UniPC, DEIS, SA-Solver."""

from __future__ import annotations

import math
from typing import Any

from diffplug.noise.gaussian_step import NormalForm, ancestral_form, with_advice
from diffplug.noise.noise_level import Level
from diffplug.noise.position import StepPosition, base_name, host
from diffplug.noise.prediction import Bound, config_bound


def solver_level(scheduler: Any, sigma: float) -> Level:
    """Return a multistep solver's level at a stored ``sigma``: VP (sigma / alpha), or flow if configured."""
    if scheduler.config.get("use_flow_sigmas", False):
        return Level(max(1.0 - sigma, 0.0), sigma)
    alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return Level(alpha, sigma * alpha)


def solver_here(scheduler: Any, at: StepPosition) -> Level:
    """Return the level at the step index of ``at``."""
    return solver_level(scheduler, host(scheduler.sigmas, at.index(scheduler)))


def solver_there(scheduler: Any, at: StepPosition) -> Level:
    """Return the level one entry further."""
    return solver_level(scheduler, host(scheduler.sigmas, at.index(scheduler) + 1))


def solver_bound(scheduler: Any) -> Bound | None:
    """Return the configured bound, but None for solvers that keep noise predictions and never look at x0."""
    return config_bound(scheduler) if getattr(scheduler, "predict_x0", True) else None


def dpm_multistep_step(scheduler: Any, at: StepPosition) -> NormalForm:
    """Return (SDE-)DPM-Solver(++) of first order, or second for the ++ types (arXiv 2211.01095)."""
    i, kind, order = at.index(scheduler), scheduler.config.algorithm_type, dpm_order(scheduler, at)
    sigmas = [host(scheduler.sigmas, j) for j in (i, i + 1)]
    here, there = (_dpm_level(scheduler, s) for s in sigmas)
    form = _dpm_first(kind, here, there)
    if order == 1:
        return form
    if order > 2 or not kind.endswith("++"):
        raise ValueError(
            f"step {i} of {type(scheduler).__name__} ({kind}) is of order {order}: "
            "supported are order 1, and 2 for the ++ types; set solver_order=1"
        )
    before = _dpm_level(scheduler, host(scheduler.sigmas, i - 1))
    return _dpm_second(form, kind, scheduler.config.solver_type, (before, here, there))


def _dpm_level(scheduler: Any, sigma: float) -> Level:
    edm = base_name(scheduler, frozenset({"EDMDPMSolverMultistepScheduler"}))
    return Level(1.0, sigma) if edm else solver_level(scheduler, sigma)


def dpm_order(scheduler: Any, at: StepPosition) -> int:
    """Return the order of the multistep update at ``at``; a fixed index counts from the first step."""
    i, n, config = at.index(scheduler), len(scheduler.timesteps), scheduler.config
    done = scheduler.lower_order_nums if at.fixed is None else i
    few = config.lower_order_final and n < 15
    if i == n - 1 and (config.get("euler_at_final", False) or few or config.final_sigmas_type == "zero"):
        return 1
    return min(config.solver_order, done + 1, 2 if few and i == n - 2 else 3)


def _dpm_first(kind: str, here: Level, there: Level) -> NormalForm:
    if kind == "sde-dpmsolver++":
        return with_advice(ancestral_form(here, there, 1.0), "an earlier step than the last")
    if kind != "sde-dpmsolver":
        return with_advice(
            ancestral_form(here, there, 0.0), "algorithm_type='sde-dpmsolver++' in the scheduler's config"
        )
    rise = there.alpha * here.sigma / here.alpha  # sigma_t e^h
    a, b = (
        2 * (rise - there.sigma) * here.alpha / here.sigma,
        2 * there.sigma / here.sigma - there.alpha / here.alpha,
    )
    return NormalForm(a=a, b=b, s=math.sqrt(max(rise**2 - there.sigma**2, 0.0)))


def _dpm_second(form: NormalForm, kind: str, solver: str, path: tuple[Level, Level, Level]) -> NormalForm:
    before, here, there = path
    h, h_before = there.lam - here.lam, here.lam - before.lam
    rate = 2.0 if kind.startswith("sde") else 1.0
    grown = math.expm1(-rate * h)
    weight = there.alpha * (grown / (rate * h) + 1.0 if solver == "heun" else -0.5 * grown)
    turn = weight * h / h_before
    return NormalForm(a=form.a + turn, b=form.b, s=form.s, history=(-turn,), advice=form.advice)
