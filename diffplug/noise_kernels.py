"""The three numbers a, b, s of a scheduler's step: x_next ~ N(a x0hat + b x, s^2 I).

One function per scheduler, in float64 on the host, from its tables alone: no network output is needed.
Sources: the formulas of each class, brought to the normal form of PSO (arXiv 2410.03190) and DDIM (arXiv
2010.02502, eq. 12, 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffplug.noise import SOLVER, family
from diffplug.noise_index import host
from diffplug.noise_level import (
    Level,
    Spot,
    base_name,
    flow_level,
    next_timestep,
    solver_level,
    table_here,
    table_level,
    table_there,
)


@dataclass(frozen=True, kw_only=True)
class NormalForm:
    """The numbers of one step: x_next = a x0 + b x + sum_j history[j] x0_j + s noise.

    history: weights of the earlier clean predictions, latest first; empty for one-step kernels.
    slack: weight of (clipped - unclipped x0hat), for DDIM whose direction ignores clipping; acts only where
    it clips.
    advice: which argument makes the step stochastic, for the error of a step with s = 0.
    """

    a: float
    b: float
    s: float
    history: tuple[float, ...] = ()
    slack: float = 0.0
    advice: str = ""

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) for v in (self.a, self.b, self.s, self.slack, *self.history))
        if not finite or self.s < 0:
            raise ValueError(f"a step needs finite a, b and s >= 0, got {self.a}, {self.b} and {self.s}")

    @property
    def kl_weight(self) -> float:
        """omega = a^2 / (2 s^2): KL between two steps per squared difference of x0hat; infinite at s = 0."""
        return math.inf if self.s == 0 else self.a**2 / (2 * self.s**2)


def bridge(here: Level, there: Level, tau2: float) -> tuple[float, float]:
    """Return (a, b) of a step that keeps the marginals when noise of variance ``tau2`` is added."""
    left = there.sigma**2 - tau2
    if left < -1e-12 * max(1.0, there.sigma**2):
        raise ValueError(
            f"noise of variance {tau2:g} is more than the {there.sigma**2:g} of the next level: lower eta"
        )
    b = math.sqrt(max(left, 0.0)) / here.sigma
    return there.alpha - here.alpha * b, b


def ancestral_form(here: Level, there: Level, eta: float) -> NormalForm:
    """Return the universal ancestral step between levels, tau^2 = eta^2 sigma_s^2 (1 - e^-2h); eta 0 is DDIM.

    Covariant under rescaling of x; well defined from pure noise (alpha_t 0) and to a clean end (sigma_s 0).
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}, allowed is a number >= 0 (0 deterministic, 1 fully ancestral)")
    if here.sigma <= 0:
        raise ValueError("the state is clean already (sigma = 0): there is no step to take from here")
    shrink = here.alpha * there.sigma / here.sigma  # alpha_s e^-h
    if shrink > there.alpha * (1 + 1e-9) or there.alpha <= 0:
        raise ValueError(f"the step from {here} to {there} adds noise: pass the less noisy level as `there`")
    fresh = max(1.0 - (shrink / there.alpha) ** 2, 0.0)
    tau = eta * there.sigma * math.sqrt(fresh)
    a, b = bridge(here, there, tau * tau)
    return NormalForm(a=a, b=b, s=tau, advice="eta > 0")


# ------------------------------------------------------------------------------------------- table schedulers


def _ddim(
    scheduler: Any, spot: Spot, *, eta: float = 0.0, use_clipped_model_output: bool = False
) -> NormalForm:
    here, there = table_here(scheduler, spot), table_there(scheduler, spot)
    form = ancestral_form(here, there, eta)
    slack = 0.0 if use_clipped_model_output else form.b * here.alpha
    advice = "eta > 0 in scheduler.step" if eta == 0 else "an earlier step than the last"
    return NormalForm(a=form.a, b=form.b, s=form.s, slack=slack, advice=advice)


def _ddpm(scheduler: Any, spot: Spot) -> NormalForm:
    """Return ancestral DDPM (arXiv 2006.11239, eq. 7); the last step has no noise."""
    kind = getattr(scheduler, "variance_type", scheduler.config.variance_type)
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(
            f"variance_type={kind!r} gives no single standard deviation: "
            "set variance_type='fixed_small' or 'fixed_large'"
        )
    t, s = spot.train_timestep(scheduler), next_timestep(scheduler, spot)
    abar = host(scheduler.alphas_cumprod, t)
    abar_s = host(scheduler.alphas_cumprod, s) if s >= 0 else 1.0
    beta = 1.0 - abar / abar_s
    a = math.sqrt(abar_s) * beta / (1.0 - abar)
    b = math.sqrt(abar / abar_s) * (1.0 - abar_s) / (1.0 - abar)
    width = beta if kind == "fixed_large" else beta * (1.0 - abar_s) / (1.0 - abar)
    return NormalForm(
        a=a, b=b, s=math.sqrt(max(width, 0.0)) if t > 0 else 0.0, advice="an earlier step than the last"
    )


def _lcm(scheduler: Any, spot: Spot) -> NormalForm:
    """Return denoising with the boundary scalings, then noise (latent consistency, arXiv 2310.04378)."""
    t, i = spot.train_timestep(scheduler), spot.index(scheduler)
    scaled = t * scheduler.config.timestep_scaling
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    if i == scheduler.num_inference_steps - 1:
        return NormalForm(
            a=out, b=skip, s=0.0, advice="an earlier step than the last (num_inference_steps > 1)"
        )
    s = int(host(scheduler.timesteps, i + 1)) if i + 1 < len(scheduler.timesteps) else t
    there = table_level(scheduler, s)
    return NormalForm(a=there.alpha * out, b=there.alpha * skip, s=there.sigma)


def _tcd(scheduler: Any, spot: Spot, *, eta: float = 0.3) -> NormalForm:
    """Return DDIM to u = floor((1 - eta) s), then noise to s (trajectory consistency, arXiv 2402.19159)."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, allowed is 0 to 1 (TCD's gamma)")
    i, s = spot.index(scheduler), next_timestep(scheduler, spot)
    u = int(torch.floor((1 - eta) * torch.tensor(s)))  # the scheduler's own float32 product decides the floor
    here, under, there = table_here(scheduler, spot), table_level(scheduler, u), table_level(scheduler, s)
    a, b = bridge(here, under, 0.0)
    if eta == 0 or i == scheduler.num_inference_steps - 1:
        return NormalForm(a=a, b=b, s=0.0, advice="eta > 0 in scheduler.step, on a step before the last")
    r = there.alpha / under.alpha
    noise = math.sqrt(max(1.0 - r * r, 0.0))
    return NormalForm(
        a=r * a, b=r * b, s=noise, advice="a larger eta in scheduler.step (floor((1-eta)s) equals s)"
    )


# ------------------------------------------------------------------------------------------- sigma schedulers


def _pair(scheduler: Any, spot: Spot) -> tuple[float, float]:
    i = spot.index(scheduler)
    return host(scheduler.sigmas, i), host(scheduler.sigmas, i + 1)


def _euler(scheduler: Any, spot: Spot) -> NormalForm:
    here, there = _pair(scheduler, spot)
    return NormalForm(a=1.0 - there / here, b=there / here, s=0.0, advice="EulerAncestralDiscreteScheduler")


def _euler_ancestral(scheduler: Any, spot: Spot) -> NormalForm:
    here, there = _pair(scheduler, spot)
    return _named(ancestral_form(Level(1.0, here), Level(1.0, there), 1.0), "an earlier step than the last")


def _named(form: NormalForm, advice: str) -> NormalForm:
    return NormalForm(a=form.a, b=form.b, s=form.s, advice=advice)


def _flow_euler(scheduler: Any, spot: Spot) -> NormalForm:
    if not scheduler.config.get("stochastic_sampling", False):
        here, there = _flow_pair(scheduler, spot)
        return _named(ancestral_form(here, there, 0.0), "stochastic_sampling=True in the scheduler's config")
    return _flow_renoise(scheduler, spot)


def _flow_renoise(scheduler: Any, spot: Spot) -> NormalForm:
    """Return x0hat noised again to the next level, the step of stochastic flow Euler and flow LCM."""
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} re-noises in the wrong direction with invert_sigmas=True: unset it"
        )
    if getattr(scheduler, "_scale_factors", None):
        raise ValueError(
            "scale_factors change the size of the sample within a step: no transition, unset them"
        )
    there = _flow_pair(scheduler, spot)[1]
    return NormalForm(a=there.alpha, b=0.0, s=there.sigma, advice="an earlier step than the last")


def _flow_pair(scheduler: Any, spot: Spot) -> tuple[Level, Level]:
    here, there = _pair(scheduler, spot)
    return flow_level(scheduler, here), flow_level(scheduler, there)


def _flow_ancestral(scheduler: Any, spot: Spot) -> NormalForm:
    """Return LTX's ancestral step of a flow: down below the next level, rescaled, and noised up to it."""
    here, there = _pair(scheduler, spot)
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


def _flow_tcd(scheduler: Any, spot: Spot) -> NormalForm:
    """Return the step to (1 - eta) times the next level, noised up to it (trajectory consistency, flow)."""
    eta = float(scheduler.config.eta)
    here, there = _pair(scheduler, spot)
    down = (1.0 - eta) * there
    lift = 1.0 if down == there else (1.0 - there) / (1.0 - down)
    s = math.sqrt(max(there**2 - (down * lift) ** 2, 0.0))
    return NormalForm(
        a=lift * (1.0 - down / here), b=lift * down / here, s=s, advice="eta > 0 in the scheduler's config"
    )


def _angle(scheduler: Any, spot: Spot) -> NormalForm:
    angle = host(scheduler.timesteps, spot.index(scheduler) + 1)
    noise = math.sin(angle) * scheduler.config.sigma_data
    return NormalForm(a=math.cos(angle), b=0.0, s=noise, advice="an earlier step than the last")


def _jump(scheduler: Any, spot: Spot) -> NormalForm:
    there = family(scheduler).there(scheduler, spot)
    s = there.sigma if len(scheduler.timesteps) > 1 else 0.0
    return NormalForm(a=1.0, b=0.0, s=s, advice="num_inference_steps > 1, on a step before the last")


# -------------------------------------------------------------------------------------- DPM-Solver, multistep


def _dpm_multistep(scheduler: Any, spot: Spot) -> NormalForm:
    """Return (SDE-)DPM-Solver(++) of first order, or second for the ++ types (arXiv 2211.01095)."""
    i, kind, order = spot.index(scheduler), scheduler.config.algorithm_type, dpm_order(scheduler, spot)
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
    return solver_level(scheduler, sigma) if family(scheduler) is SOLVER else Level(1.0, sigma)


def dpm_order(scheduler: Any, spot: Spot) -> int:
    """Return the order of the multistep update at ``spot``; a fixed index counts from the first step."""
    i, n, config = spot.index(scheduler), len(scheduler.timesteps), scheduler.config
    done = scheduler.lower_order_nums if spot.fixed is None else i
    few = config.lower_order_final and n < 15
    if i == n - 1 and (config.get("euler_at_final", False) or few or config.final_sigmas_type == "zero"):
        return 1
    return min(config.solver_order, done + 1, 2 if few and i == n - 2 else 3)


def _dpm_first(kind: str, here: Level, there: Level) -> NormalForm:
    if kind == "sde-dpmsolver++":
        return _named(ancestral_form(here, there, 1.0), "an earlier step than the last")
    if kind != "sde-dpmsolver":
        return _named(
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


KERNELS: dict[str, Callable[..., NormalForm]] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "EulerDiscreteScheduler": _euler,
    "EDMEulerScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _dpm_multistep,
    "EDMDPMSolverMultistepScheduler": _dpm_multistep,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchLCMScheduler": _flow_renoise,
    "FlowMatchTCDScheduler": _flow_tcd,
    "LTXEulerAncestralRFScheduler": _flow_ancestral,
    "SCMScheduler": _angle,
    "CMStochasticIterativeScheduler": _jump,
}


def kernel_name(scheduler: Any) -> str:
    """Return the class name under which a scheduler's kernel is known; ValueError where there is none."""
    name = base_name(scheduler, frozenset(KERNELS))
    if not name:
        raise ValueError(
            f"{type(scheduler).__name__} has no Gaussian transition here: "
            f"supported are {', '.join(KERNELS)}; "
            "diffplug.transition.ancestral makes a step between any two levels"
        )
    return name
