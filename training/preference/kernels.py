"""The kernel that a config asks for, and the sampler that the tuned model is drawn with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffplug.samplers.few_step.grids import trailing
from diffplug.training.noise_path import NoisePath
from diffplug.training.preference.kernel import Kernel
from diffplug.training.student import Sampling

__all__ = ["SchedulerSampling", "kernel_of", "sampling_of", "scheduler_of"]

OWN = ("ddim", "renoise", "flow-sde")
_WITH_ETA = ("ddim", "flow-sde", "DDIMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class SchedulerSampling(Sampling):
    """Drawing with a scheduler class of Diffusers.

    timesteps: those that it was trained on, None for trailing ones.
    """

    named: str = ""
    timesteps: tuple[int, ...] | None = None

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """The class, and the options that the kernel was built with."""
        return self.named, _options(_class(self.named), self.path)

    def given(self, steps: int) -> tuple[int, ...] | None:
        """The timesteps, but for classes that find the trailing ones by themselves."""
        if self.path.flow or not _takes(_class(self.named).set_timesteps, "timesteps"):
            return None
        return self.timesteps or _trailing(self.path, steps)


def kernel_of(job: Any) -> Kernel:
    """Return the kernel of a job's [objective] on the grid of its student.

    Raises ValueError for an unknown name, for a scheduler without a Gaussian step, and for eta or timesteps
    where they would do nothing.
    """
    told, steps = job.objective, job.config.student.steps
    _refuse_idle(told)
    if told.kernel == "ddim":
        return Kernel.ddim(job.path, steps, told.eta, told.omega_max)
    if told.kernel == "renoise":
        return Kernel.renoise(job.path, steps, told.omega_max)
    if told.kernel == "flow-sde":
        return Kernel.flow_sde(job.path, steps, told.eta, told.omega_max)
    scheduler = scheduler_of(told.kernel, job.pipe.scheduler.config, job.path, steps, told.timesteps)
    eta = {"eta": told.eta} if told.kernel in _WITH_ETA else {}
    return Kernel.of(scheduler, job.path, omega_max=told.omega_max, **eta)


def scheduler_of(
    name: str, config: Any, path: NoisePath, steps: int, timesteps: tuple[int, ...] | None = None
) -> Any:
    """Return a scheduler of Diffusers with its timesteps set: those given, or trailing ones.

    Raises ValueError for a name that is none, and for timesteps that it cannot be given or that do not fall.
    """
    cls = _class(name)
    scheduler = cls.from_config(config, **_options(cls, path))
    takes = _takes(cls.set_timesteps, "timesteps")
    if timesteps is not None:
        _check_timesteps(timesteps, name, path, steps, takes)
    if path.flow and _takes(cls.set_timesteps, "sigmas"):
        scheduler.set_timesteps(sigmas=[1 - j / steps for j in range(steps)])
    elif takes and not path.flow:
        scheduler.set_timesteps(timesteps=list(timesteps or _trailing(path, steps)))
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def sampling_of(job: Any) -> Sampling:
    """Return how the tuned model is drawn with: as the student, or with the kernel's own scheduler."""
    told, student = job.objective, job.config.student
    name = {"renoise": "FlowMatchLCMScheduler" if job.path.flow else "LCMScheduler"}.get(
        told.kernel, told.kernel
    )
    trained = told.guidance if told.guidance > 1 else None
    scale = trained if student.guidance is None else student.guidance
    way: dict[str, Any] = {"eta": student.eta, "guidance": scale}
    if name in OWN:
        return Sampling(job.path, (student.steps,), **way)
    return SchedulerSampling(job.path, (student.steps,), **way, named=name, timesteps=told.timesteps)


def _class(name: str) -> Any:
    """Return a scheduler class of Diffusers; ValueError with the nearest names for anything else."""
    import diffusers

    from diffplug.registry import unknown

    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config") or not hasattr(cls, "set_timesteps"):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        raise unknown("kernel", name, [*OWN, *known])
    return cls


def _options(cls: Any, path: NoisePath) -> dict[str, Any]:
    """Return what differs from the configuration of the model's own scheduler: the student's grid."""
    flow = {"shift": path.shift, "use_dynamic_shifting": False, "shift_terminal": None}
    wanted = flow if path.flow else {"timestep_spacing": "trailing", "clip_sample": False}
    return {name: value for name, value in wanted.items() if _takes(cls, name)}


def _takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _trailing(path: NoisePath, steps: int) -> tuple[int, ...]:
    return tuple(int(t) for t in trailing(steps, path.train_steps))


def _refuse_idle(told: Any) -> None:
    """Raise ValueError for settings that this kernel has no use for."""
    if told.timesteps is not None and told.kernel in OWN:
        raise ValueError(
            f"objective.timesteps would do nothing with kernel={told.kernel!r}, whose grid is the student's: "
            "leave it out, or name a scheduler class"
        )
    if told.kernel not in _WITH_ETA and told.eta != type(told)().eta:
        raise ValueError(
            f"objective.eta={told.eta:g} would do nothing with kernel={told.kernel!r}, whose noise is fixed: "
            f"leave it out, or take one of {', '.join(_WITH_ETA)}"
        )


def _check_timesteps(timesteps: tuple[int, ...], name: str, path: NoisePath, steps: int, takes: bool) -> None:
    """Raise ValueError for timesteps that cannot be a student's of so many steps."""
    told = f"objective.timesteps is {list(timesteps)}"
    if path.flow or not takes:
        raise ValueError(f"{told}, and {name} takes no list of timesteps here: leave it out")
    if len(timesteps) != steps:
        raise ValueError(f"{told}, and student.steps {steps}: give as many timesteps as steps")
    falls = all(a > b for a, b in pairwise(timesteps))
    if not falls or timesteps[-1] < 0 or timesteps[0] >= path.train_steps:
        raise ValueError(f"{told}: they have to fall, from at most {path.train_steps - 1} to at least 0")
