"""The kernel that a config asks for, and the sampler that the tuned model is drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffplug.training.noise_path import NoisePath
from diffplug.training.preference.kernel import Kernel
from diffplug.training.student import Sampling

__all__ = ["SchedulerSampling", "kernel_of", "sampling_of", "scheduler_of"]

OWN = ("ddim", "renoise", "flow-sde")


@dataclass(frozen=True)
class SchedulerSampling(Sampling):
    """Drawing with a scheduler class of Diffusers."""

    named: str = ""

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """The class, on the trailing grid."""
        return self.named, {} if self.path.flow else {"timestep_spacing": "trailing"}


def kernel_of(job: Any) -> Kernel:
    """Return the kernel of a job's [objective] on the grid of its student.

    Raises ValueError for an unknown name, and for a scheduler without a Gaussian step.
    """
    told, steps = job.objective, job.config.student.steps
    if told.kernel == "ddim":
        return Kernel.ddim(job.path, steps, told.eta, told.omega_max)
    if told.kernel == "renoise":
        return Kernel.renoise(job.path, steps, told.omega_max)
    if told.kernel == "flow-sde":
        return Kernel.flow_sde(job.path, steps, told.eta)
    scheduler = scheduler_of(told.kernel, job.pipe.scheduler.config, job.path, steps, told.timesteps)
    eta = {"eta": told.eta} if told.kernel in ("DDIMScheduler", "TCDScheduler") else {}
    return Kernel.of(scheduler, job.path, omega_max=told.omega_max, **eta)


def scheduler_of(
    name: str, config: Any, path: NoisePath, steps: int, timesteps: tuple[int, ...] | None = None
) -> Any:
    """Return a scheduler of Diffusers with its timesteps set: those given, or trailing ones."""
    import diffusers

    from diffplug.registry import unknown

    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        raise unknown("kernel", name, [*OWN, *known])
    options: dict[str, Any] = {} if path.flow else {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = cls.from_config(config, **options)
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps))
    elif name == "LCMScheduler" or name == "TCDScheduler":
        grid = [round(path.train_steps - j * path.train_steps / steps) - 1 for j in range(steps)]
        scheduler.set_timesteps(timesteps=grid)
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def sampling_of(job: Any) -> Sampling:
    """Return how the tuned model is drawn with: as the student, or with the kernel's own scheduler."""
    told, student = job.objective, job.config.student
    name = {"renoise": "FlowMatchLCMScheduler" if job.path.flow else "LCMScheduler"}.get(
        told.kernel, told.kernel
    )
    if name in OWN:
        return Sampling(job.path, (student.steps,), student.eta, student.guidance)
    return SchedulerSampling(job.path, (student.steps,), student.eta, student.guidance, name)
