"""Signal and noise of a state before and after a scheduler's step, in the scheduler's own latent convention.

One pair of functions per family of schedulers: ``*_here`` gives the level of the sample that ``step``
receives, and ``*_there`` the level of the sample it gives back. ``diffplug.noise`` lists the families and
their conventions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffplug.noise_index import find, host, step_index, timestep_value


@dataclass(frozen=True)
class Level:
    """Signal ``alpha`` and noise ``sigma`` of a state x = alpha x0 + sigma eps; finite and at least 0."""

    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.sigma < math.inf):
            raise ValueError(
                f"a level needs finite alpha >= 0 and sigma >= 0, got {self.alpha} and {self.sigma}"
            )

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio (alpha / sigma)^2, infinite for a clean state."""
        return math.inf if self.sigma == 0 else (self.alpha / self.sigma) ** 2

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log alpha - log sigma; infinite at the ends."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


CLEAN = Level(1.0, 0.0)


@dataclass(frozen=True)
class Spot:
    """A place in a schedule: a ``fixed`` step index, or (None) where the scheduler stands at ``timestep``."""

    timestep: Any
    fixed: int | None = None

    def index(self, scheduler: Any) -> int:
        """Return the step index: the fixed one, or the one a ``step`` call would take now."""
        return step_index(scheduler, self.timestep) if self.fixed is None else self.fixed

    def train_timestep(self, scheduler: Any) -> int:
        """Return the integer training timestep at this place."""
        if self.fixed is not None:
            return int(host(scheduler.timesteps, self.fixed))
        return int(timestep_value(scheduler, self.timestep))


def base_name(scheduler: Any, names: frozenset[str]) -> str:
    """Return the first of ``names`` among a scheduler's class and its ancestors, else an empty string."""
    return next((c.__name__ for c in type(scheduler).__mro__ if c.__name__ in names), "")


# ---------------------------------------------------------------- table: cumulative products by timestep (VP)


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


def next_timestep(scheduler: Any, spot: Spot) -> int:
    """Return the training timestep that a step from ``spot`` leads to, below 0 at the end of the schedule.

    LCM and TCD give it only for the steps they take on their list: 0 and below for the last one.
    """
    t, name = spot.train_timestep(scheduler), base_name(scheduler, _SPECIAL)
    if name in LISTED:
        return _next_listed(scheduler, spot, name, t)
    if name == "UnCLIPScheduler":
        return t - 1
    if name == "PNDMScheduler":
        return _next_pndm(scheduler, t, scheduler.counter if spot.fixed is None else spot.fixed)
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


def _next_listed(scheduler: Any, spot: Spot, name: str, t: int) -> int:
    """Return the following timestep of the list, as DDPM (by value), LCM and TCD (by counter) find it."""
    by_value = name.startswith("DDPM")
    if by_value and not (scheduler.custom_timesteps or scheduler.num_inference_steps):
        return t - 1
    i = find(scheduler, t) if by_value and spot.fixed is None else spot.index(scheduler)
    if i + 1 < len(scheduler.timesteps):
        return int(host(scheduler.timesteps, i + 1))
    return 0 if name == "TCDScheduler" else -1


def table_here(scheduler: Any, spot: Spot) -> Level:
    """Return the level of the sample at the timestep of ``spot``."""
    return table_level(scheduler, spot.train_timestep(scheduler))


def table_there(scheduler: Any, spot: Spot) -> Level:
    """Return the level the step leads to; LCM gives back its clean prediction at the end."""
    t = next_timestep(scheduler, spot)
    return CLEAN if t < 0 and base_name(scheduler, LISTED) == "LCMScheduler" else table_level(scheduler, t)


# ---------------------------------------------------------------- solver: stored sigma / alpha, or flow sigma


def solver_level(scheduler: Any, sigma: float) -> Level:
    """Return a multistep solver's level at a stored ``sigma``: VP (sigma / alpha), or flow if configured."""
    if scheduler.config.get("use_flow_sigmas", False):
        return Level(max(1.0 - sigma, 0.0), sigma)
    alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return Level(alpha, sigma * alpha)


def solver_here(scheduler: Any, spot: Spot) -> Level:
    """Return the level at the step index of ``spot``."""
    return solver_level(scheduler, host(scheduler.sigmas, spot.index(scheduler)))


def solver_there(scheduler: Any, spot: Spot) -> Level:
    """Return the level one entry further."""
    return solver_level(scheduler, host(scheduler.sigmas, spot.index(scheduler) + 1))


# --------------------------------------------------------------- ve: x = x0 + sigma eps, some with two stages


def ve_here(scheduler: Any, spot: Spot) -> Level:
    """Return Level(1, sigma) of the sample, between the stages of a two-stage step too."""
    return Level(1.0, _stage_sigma(scheduler, spot.index(scheduler), _first_stage(scheduler, spot)))


def ve_there(scheduler: Any, spot: Spot) -> Level:
    """Return Level(1, sigma) of the sample this call gives back, after a first stage the mid-step one."""
    return Level(1.0, _stage_sigma(scheduler, spot.index(scheduler) + 1, not _first_stage(scheduler, spot)))


def _first_stage(scheduler: Any, spot: Spot) -> bool:
    """Return whether a call at ``spot`` begins a step; always true for schedulers with one stage."""
    if getattr(scheduler, "order", 1) == 1:
        return True
    if spot.fixed is not None:
        return spot.fixed % 2 == 0
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


def sigma_here(scheduler: Any, spot: Spot) -> Level:
    """Return Level(1, sigma) at the step index of ``spot``."""
    return Level(1.0, host(scheduler.sigmas, spot.index(scheduler)))


def sigma_there(scheduler: Any, spot: Spot) -> Level:
    """Return Level(1, sigma) one entry further."""
    return Level(1.0, host(scheduler.sigmas, spot.index(scheduler) + 1))


# ------------------------------------------------------------------------------ flow, angles, jumps and iPNDM


def flow_level(scheduler: Any, sigma: float) -> Level:
    """Return the level 1 - sigma, sigma of a straight-line flow; inverted schedules store the signal."""
    rest = max(1.0 - sigma, 0.0)  # shifted float32 schedules may start a rounding above 1
    return Level(sigma, rest) if scheduler.config.get("invert_sigmas") else Level(rest, sigma)


def flow_here(scheduler: Any, spot: Spot) -> Level:
    """Return the level at the step index of ``spot``."""
    return flow_level(scheduler, host(scheduler.sigmas, spot.index(scheduler)))


def flow_there(scheduler: Any, spot: Spot) -> Level:
    """Return the level one entry further."""
    return flow_level(scheduler, host(scheduler.sigmas, spot.index(scheduler) + 1))


def _angle_level(scheduler: Any, i: int) -> Level:
    angle = host(scheduler.timesteps, i)
    return Level(max(math.cos(angle), 0.0), math.sin(angle) * scheduler.config.sigma_data)


def angle_here(scheduler: Any, spot: Spot) -> Level:
    """Return cos, sin * sigma_data of the angle at ``spot`` (TrigFlow, arXiv 2410.11081)."""
    return _angle_level(scheduler, spot.index(scheduler))


def angle_there(scheduler: Any, spot: Spot) -> Level:
    """Return cos, sin * sigma_data of the next angle."""
    return _angle_level(scheduler, spot.index(scheduler) + 1)


def jump_there(scheduler: Any, spot: Spot) -> Level:
    """Return the level a consistency model re-noises to: its next sigma less the smallest, in quadrature."""
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    sigma = min(max(host(scheduler.sigmas, spot.index(scheduler) + 1), low), high)
    return Level(1.0, scheduler.config.s_noise * math.sqrt(sigma * sigma - low * low))


def ipndm_here(scheduler: Any, spot: Spot) -> Level:
    """Return the stored pair alphas, betas (their squares sum to 1) at ``spot``."""
    i = spot.index(scheduler)
    return Level(host(scheduler.alphas, i), host(scheduler.betas, i))


def ipndm_there(scheduler: Any, spot: Spot) -> Level:
    """Return the stored pair one entry further."""
    i = spot.index(scheduler) + 1
    return Level(host(scheduler.alphas, i), host(scheduler.betas, i))
