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

from diffplug.noise import flow, sigma, solver, table
from diffplug.noise.gaussian_step import NormalForm
from diffplug.noise.noise_level import CLEAN, Level
from diffplug.noise.position import StepPosition, base_name
from diffplug.noise.prediction import Bound, config_bound, config_mix, mean_channels, unbounded, wide

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
    return family(scheduler).here(scheduler, position(scheduler, timestep, step_index))


def next_level(scheduler: Any, timestep: Any = None, *, step_index: int | None = None) -> Level:
    """Return signal and noise of what ``step`` gives back at ``timestep``; a clean end is Level(1, 0)."""
    return family(scheduler).there(scheduler, position(scheduler, timestep, step_index))


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
    bound: Bound | None = None

    def raw(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the clean prediction before clipping, float32 or wider, shaped like ``sample``."""
        x, m = wide(sample), wide(mean_channels(output, sample))
        if self.keep == 0:
            return (self.gain * m).to(torch.promote_types(x.dtype, m.dtype))
        return self.keep * x + self.gain * m

    def clip(self, x0: Tensor) -> Tensor:
        """Return ``x0`` after the scheduler's thresholding or clipping; the same tensor where it has none."""
        return x0 if self.bound is None else self.bound(x0)


def reading(scheduler: Any, timestep: Any = None, *, step_index: int | None = None) -> Reading:
    """Return the ``Reading`` of the sample at ``timestep``: what ``x0hat`` computes, as numbers."""
    kind = family(scheduler)
    now = kind.here(scheduler, position(scheduler, timestep, step_index))
    return Reading(now, *kind.mix(scheduler, now), kind.bound(scheduler))


def position(scheduler: Any, timestep: Any, step_index: int | None) -> StepPosition:
    """Return the place in the schedule that is meant; ValueError when it is missing or outside."""
    if step_index is None:
        if timestep is None:
            raise ValueError("neither timestep nor step_index was given: pass one of them")
        return StepPosition(timestep)
    if not 0 <= step_index < step_count(scheduler):
        raise ValueError(
            f"step_index {step_index} is outside the {step_count(scheduler)} steps of the schedule"
        )
    return StepPosition(timestep, step_index)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of schedulers is read: levels before and after a step, (keep, gain), and clipping."""

    name: str
    here: Callable[[Any, StepPosition], Level]
    there: Callable[[Any, StepPosition], Level]
    mix: Callable[[Any, Level], tuple[float, float]]
    bound: Callable[[Any], Bound | None] = unbounded


TABLE = Family(
    name="table", here=table.table_here, there=table.table_there, mix=config_mix, bound=table.table_bound
)
SOLVER = Family(
    name="solver",
    here=solver.solver_here,
    there=solver.solver_there,
    mix=config_mix,
    bound=solver.solver_bound,
)
VE = Family(name="ve", here=sigma.ve_here, there=sigma.ve_there, mix=config_mix, bound=config_bound)
EDM = Family(
    name="edm", here=sigma.sigma_here, there=sigma.sigma_there, mix=sigma.edm_mix, bound=config_bound
)
FLOW = Family(name="flow", here=flow.flow_here, there=flow.flow_there, mix=flow.flow_mix)
ANGLE = Family(name="angle", here=flow.angle_here, there=flow.angle_there, mix=flow.angle_mix)
JUMP = Family(
    name="jump", here=sigma.sigma_here, there=sigma.jump_there, mix=sigma.jump_mix, bound=sigma.jump_bound
)
IPNDM = Family(name="ipndm", here=sigma.ipndm_here, there=sigma.ipndm_there, mix=sigma.ipndm_mix)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a scheduler class.

    family: how its levels and outputs are read. step: its Gaussian step as numbers, None where it has none.
    noise: whether its steps are random: "always", "never", by the argument "eta" (with `eta` as its default),
    or by the "config" (an algorithm type that begins with sde, stochastic_sampling, its own eta). churn:
    whether noise added between its steps stays and does no harm.
    """

    family: Family
    step: Callable[..., NormalForm] | None = None
    noise: str = "config"
    eta: float = 0.0
    churn: bool = False


KNOWN: dict[str, Known] = {
    "DDIMScheduler": Known(family=TABLE, step=table.ddim_step, noise="eta", churn=True),
    "DDIMParallelScheduler": Known(family=TABLE, step=table.ddim_step, noise="eta"),
    "DDPMScheduler": Known(family=TABLE, step=table.ddpm_step, noise="always"),
    "DDPMParallelScheduler": Known(family=TABLE, step=table.ddpm_step, noise="always"),
    "PNDMScheduler": Known(family=TABLE),
    "LCMScheduler": Known(family=TABLE, step=table.lcm_step, noise="always"),
    "TCDScheduler": Known(family=TABLE, step=table.tcd_step, noise="eta", eta=0.3),
    "CogVideoXDDIMScheduler": Known(family=TABLE, noise="never", churn=True),  # takes eta and ignores it
    "CogVideoXDPMScheduler": Known(family=TABLE, noise="always"),
    "UnCLIPScheduler": Known(family=TABLE, noise="always"),
    "RePaintScheduler": Known(family=TABLE, noise="always"),
    "DPMSolverMultistepScheduler": Known(family=SOLVER, step=solver.dpm_multistep_step, churn=True),
    "DPMSolverSinglestepScheduler": Known(family=SOLVER),
    "UniPCMultistepScheduler": Known(family=SOLVER, churn=True),
    "DEISMultistepScheduler": Known(family=SOLVER, churn=True),
    "SASolverScheduler": Known(family=SOLVER, noise="always", churn=True),
    "EulerDiscreteScheduler": Known(family=VE, step=sigma.euler_step, churn=True),
    "EulerAncestralDiscreteScheduler": Known(family=VE, step=sigma.euler_ancestral_step, noise="always"),
    "HeunDiscreteScheduler": Known(family=VE, churn=True),
    "LMSDiscreteScheduler": Known(family=VE),
    "KDPM2DiscreteScheduler": Known(family=VE),
    "KDPM2AncestralDiscreteScheduler": Known(family=VE, noise="always"),
    "DPMSolverSDEScheduler": Known(family=VE, noise="always"),
    "EDMEulerScheduler": Known(family=EDM, step=sigma.euler_step, churn=True),
    "EDMDPMSolverMultistepScheduler": Known(family=EDM, step=solver.dpm_multistep_step, churn=True),
    "CosineDPMSolverMultistepScheduler": Known(family=EDM, noise="always"),
    "FlowMatchEulerDiscreteScheduler": Known(family=FLOW, step=flow.flow_euler_step, churn=True),
    "FlowMatchHeunDiscreteScheduler": Known(family=FLOW, churn=True),
    "FlowMatchLCMScheduler": Known(family=FLOW, step=flow.flow_renoise_step, noise="always"),
    "FlowMatchTCDScheduler": Known(family=FLOW, step=flow.flow_tcd_step, noise="config"),
    "LTXEulerAncestralRFScheduler": Known(family=FLOW, step=flow.flow_ancestral_step, noise="always"),
    "SCMScheduler": Known(family=ANGLE, step=flow.angle_step, noise="always"),
    "CMStochasticIterativeScheduler": Known(family=JUMP, step=sigma.jump_step, noise="always"),
    "IPNDMScheduler": Known(family=IPNDM, churn=True),
}
"""Everything about a scheduler class that is not a formula; a new Diffusers scheduler is one line here."""


def known(scheduler: Any) -> Known | None:
    """Return the row of `KNOWN` for a scheduler's class or the nearest ancestor that has one."""
    name = base_name(scheduler, frozenset(KNOWN))
    return KNOWN[name] if name else None


def step_kernel(scheduler: Any) -> Callable[..., NormalForm]:
    """Return the function that gives a scheduler's Gaussian step; ValueError where there is none."""
    row = known(scheduler)
    if row is None or row.step is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no Gaussian transition here: supported are "
            f"{', '.join(name for name, row in KNOWN.items() if row.step is not None)}; "
            "diffplug.transition.ancestral makes a step between any two levels"
        )
    return row.step


def family(scheduler: Any) -> Family:
    """Return the ``Family`` of a scheduler: its own class's, its parent's, else that of what it carries.

    Classes that do not come from Diffusers are recognised by ``sigmas``, ``alphas_cumprod``,
    ``precondition_outputs`` and ``config.use_flow_sigmas``. Raises ValueError, naming the class, for all
    others (token and inversion schedulers among them).
    """
    for cls in type(scheduler).__mro__:
        if cls.__name__ in KNOWN:
            return KNOWN[cls.__name__].family
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
        f"{', '.join(KNOWN)}, their subclasses, and classes with the same sigmas or alphas_cumprod"
    )
