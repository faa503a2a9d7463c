"""Signal and noise levels of any scheduler, and the clean prediction x0hat from any network output.

Together with ``diffplug.transition`` the one place that knows schedulers' mathematics. A scheduler is read as
two lines: about the sample it is about to step, x = alpha x0 + sigma eps, and about the network output, x0hat
= keep x + gain output, followed by the scheduler's own clipping. What ``x`` is, per family:

======  =======================  ============================================================================
family  alpha, sigma             schedulers
======  =======================  ============================================================================
table   sqrt(abar), sqrt(1-..)   DDIM, DDPM, PNDM, LCM, TCD, CogVideoX, UnCLIP, RePaint (by timestep)
solver  VP; 1-s, s when flow     DPM-Solver multistep and singlestep, UniPC, DEIS, SA-Solver (by step index)
ve      1, s                     Euler, Euler ancestral, Heun, LMS, KDPM2, KDPM2 ancestral, DPM-Solver SDE
edm     1, s                     EDM Euler, EDM DPM-Solver, cosine DPM-Solver (preconditioned outputs)
flow    1-s, s                   flow-matching Euler, Heun, LCM; LTX Euler ancestral; s, 1-s if inverted
angle   cos, sin * sigma_data    SCM (TrigFlow)
jump    1, s                     consistency models (boundary-condition outputs)
ipndm   sqrt(1-s^2), s           iPNDM
======  =======================  ============================================================================

Subclasses belong to the family of their parent; other classes are recognised by what they carry (``family``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug import noise_level, noise_prediction
from diffplug.noise_level import CLEAN, Level, Spot

__all__ = [
    "CLEAN",
    "Family",
    "Level",
    "Reading",
    "family",
    "level",
    "levels",
    "next_level",
    "reading",
    "step_count",
    "x0hat",
]


def x0hat(
    scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, *, step_index: int | None = None
) -> Tensor:
    """Return the clean prediction ``scheduler`` draws from ``output``; one multiply-add, nothing is mutated.

    output: network output as handed to ``scheduler.step`` (after guidance), [n, c, ...] or, with learned
    variance, [n, 2c, ...] (the second half is dropped). sample: [n, c, ...] in the scheduler's own
    convention.
    timestep: number or one-element tensor. step_index: which step of the schedule is meant; default: the one
    that a ``step`` call would take now (running index, else begin index, else the place of ``timestep``).
    Result: shaped like ``sample``, float32 or wider, thresholded or clipped as the scheduler does;
    differentiable.
    Raises ValueError for schedulers of no known family, unknown timesteps, and epsilon predictions at alpha =
    0.
    """
    now = reading(scheduler, timestep, step_index=step_index)
    return now.clip(now.raw(output, sample))


def level(scheduler: Any, timestep: Any = None, *, step_index: int | None = None) -> Level:
    """Return signal and noise of the sample at ``timestep``, in the scheduler's own convention (see above).

    It is the level ``step`` would find now: while a run is under way, schedulers that count steps go by their
    counter. ``step_index`` asks for another step, and then ``timestep`` may be left out.
    """
    return family(scheduler).here(scheduler, spot(scheduler, timestep, step_index))


def next_level(scheduler: Any, timestep: Any = None, *, step_index: int | None = None) -> Level:
    """Return signal and noise of what ``step`` gives back at ``timestep``; a clean end is Level(1, 0)."""
    return family(scheduler).there(scheduler, spot(scheduler, timestep, step_index))


def levels(scheduler: Any) -> list[Level]:
    """Return the level before every step of the schedule and, last, the one after the final step."""
    n = step_count(scheduler)
    return [level(scheduler, step_index=i) for i in range(n)] + [next_level(scheduler, step_index=n - 1)]


def step_count(scheduler: Any) -> int:
    """Return how often ``step`` is called in the schedule that is set; angle schedules list their end too."""
    return len(scheduler.timesteps) - (family(scheduler) is ANGLE)


@dataclass(frozen=True)
class Reading:
    """What a scheduler says about its sample: the level, and x0hat = bound(keep * x + gain * output)."""

    level: Level
    keep: float
    gain: float
    bound: noise_prediction.Bound | None = None

    def raw(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the clean prediction before clipping, float32 or wider, shaped like ``sample``."""
        x, m = (
            noise_prediction.wide(sample),
            noise_prediction.wide(noise_prediction.mean_channels(output, sample)),
        )
        if self.keep == 0:
            return (self.gain * m).to(torch.promote_types(x.dtype, m.dtype))
        return self.keep * x + self.gain * m

    def clip(self, x0: Tensor) -> Tensor:
        """Return ``x0`` after the scheduler's thresholding or clipping; the same tensor where it has none."""
        return x0 if self.bound is None else self.bound(x0)


def reading(scheduler: Any, timestep: Any = None, *, step_index: int | None = None) -> Reading:
    """Return the ``Reading`` of the sample at ``timestep``: what ``x0hat`` computes, as numbers."""
    kind = family(scheduler)
    now = kind.here(scheduler, spot(scheduler, timestep, step_index))
    return Reading(now, *kind.mix(scheduler, now), kind.bound(scheduler))


def spot(scheduler: Any, timestep: Any, step_index: int | None) -> Spot:
    """Return the place in the schedule that is meant; ValueError when it is missing or outside."""
    if step_index is None:
        if timestep is None:
            raise ValueError("neither timestep nor step_index was given: pass one of them")
        return Spot(timestep)
    if not 0 <= step_index < step_count(scheduler):
        raise ValueError(
            f"step_index {step_index} is outside the {step_count(scheduler)} steps of the schedule"
        )
    return Spot(timestep, step_index)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of schedulers is read: levels before and after a step, (keep, gain), and clipping."""

    name: str
    here: Callable[[Any, Spot], Level]
    there: Callable[[Any, Spot], Level]
    mix: Callable[[Any, Level], tuple[float, float]]
    bound: Callable[[Any], noise_prediction.Bound | None] = noise_prediction.unbounded


TABLE = Family(
    name="table",
    here=noise_level.table_here,
    there=noise_level.table_there,
    mix=noise_prediction.config_mix,
    bound=noise_prediction.table_bound,
)
SOLVER = Family(
    name="solver",
    here=noise_level.solver_here,
    there=noise_level.solver_there,
    mix=noise_prediction.config_mix,
    bound=noise_prediction.solver_bound,
)
VE = Family(
    name="ve",
    here=noise_level.ve_here,
    there=noise_level.ve_there,
    mix=noise_prediction.config_mix,
    bound=noise_prediction.config_bound,
)
EDM = Family(
    name="edm",
    here=noise_level.sigma_here,
    there=noise_level.sigma_there,
    mix=noise_prediction.edm_mix,
    bound=noise_prediction.config_bound,
)
FLOW = Family(
    name="flow", here=noise_level.flow_here, there=noise_level.flow_there, mix=noise_prediction.flow_mix
)
ANGLE = Family(
    name="angle", here=noise_level.angle_here, there=noise_level.angle_there, mix=noise_prediction.angle_mix
)
JUMP = Family(
    name="jump",
    here=noise_level.sigma_here,
    there=noise_level.jump_there,
    mix=noise_prediction.jump_mix,
    bound=noise_prediction.jump_bound,
)
IPNDM = Family(
    name="ipndm", here=noise_level.ipndm_here, there=noise_level.ipndm_there, mix=noise_prediction.ipndm_mix
)

FAMILIES: dict[str, Family] = {
    f"{name}Scheduler": kind
    for kind, names in (
        (TABLE, "DDIM DDIMParallel DDPM DDPMParallel PNDM LCM TCD CogVideoXDDIM CogVideoXDPM UnCLIP RePaint"),
        (SOLVER, "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver"),
        (VE, "EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete"),
        (VE, "KDPM2Discrete KDPM2AncestralDiscrete DPMSolverSDE"),
        (EDM, "EDMEuler EDMDPMSolverMultistep CosineDPMSolverMultistep"),
        (FLOW, "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM LTXEulerAncestralRF"),
        (ANGLE, "SCM"),
        (JUMP, "CMStochasticIterative"),
        (IPNDM, "IPNDM"),
    )
    for name in names.split()
}


def family(scheduler: Any) -> Family:
    """Return the ``Family`` of a scheduler: its own class's, its parent's, else that of what it carries.

    Classes that do not come from Diffusers are recognised by ``sigmas``, ``alphas_cumprod``,
    ``precondition_outputs`` and ``config.use_flow_sigmas``. Raises ValueError, naming the class, for all
    others (token and inversion schedulers among them).
    """
    for cls in type(scheduler).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
        if cls.__module__.startswith("diffusers.schedulers.scheduling_") and cls.__name__ != "SchedulerMixin":
            raise _unknown(scheduler)
    return _lookalike(scheduler)


def _lookalike(scheduler: Any) -> Family:
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "timesteps"):
        raise _unknown(scheduler)
    table, sigmas = hasattr(scheduler, "alphas_cumprod"), hasattr(scheduler, "sigmas")
    if sigmas and "use_flow_sigmas" in config:
        return SOLVER
    if sigmas and hasattr(scheduler, "precondition_outputs"):
        return EDM
    if sigmas:
        return VE if table else FLOW
    if table:
        return TABLE
    raise _unknown(scheduler)


def _unknown(scheduler: Any) -> ValueError:
    return ValueError(
        f"{type(scheduler).__name__} is a scheduler whose noise levels are not known here: supported are "
        f"{', '.join(FAMILIES)}, their subclasses, and classes with the same sigmas or alphas_cumprod"
    )
