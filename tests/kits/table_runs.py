"""Solver tables and Diffusers' schedulers on a smooth network that is nobody's model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.compile import compile_schedule

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
VP_LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))
FLOW_LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**FLOW))


def noise_of(x: Tensor, i: int) -> Tensor:
    """Some smooth nonlinear noise prediction."""
    return torch.tanh(1.3 * x + 0.1 * i)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def ours(schedule: SolverSchedule, levels: NoiseLevels = VP_LEVELS, **given: Any) -> Tensor:
    """The final state of a schedule's table, float64."""
    table = compile_schedule(schedule, levels, **given)

    def denoise(x: Tensor, i: int) -> Tensor:
        at = table.levels[i]
        return (x - at.sigma * noise_of(x, i)) / at.alpha

    return table.run(denoise, start())


def theirs(scheduler: Any, sigmas: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """The final state of a Diffusers scheduler of epsilon prediction, driven with our sigmas in float64."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.set_begin_index(0)
    x = start(dtype)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(noise_of(x, i), t, x, return_dict=False)[0]
    return x.double()
