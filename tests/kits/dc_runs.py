"""DC-Solver run by hand on a smooth network that is nobody's model."""

from __future__ import annotations

from typing import Any

import torch

from diffplug.samplers import DCSolverScheduler

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
RATIOS = [1.0, 1.0, 0.93, 0.81, 1.22, 1.07]
NAN = float("nan")


def network(x: torch.Tensor, call: int) -> torch.Tensor:
    """Some smooth nonlinear output."""
    return torch.tanh(1.3 * x + 0.1 * call)


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def sample(scheduler: Any, x: torch.Tensor, begin: int = 0, stop: int | None = None) -> torch.Tensor:
    for call, t in enumerate(scheduler.timesteps[begin:stop], begin):
        x = scheduler.step(network(x, call), t, x, return_dict=False)[0]
    return x


def run(scheduler: Any, dtype: torch.dtype = torch.float64, steps: int = 6, **grid: Any) -> torch.Tensor:
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}))
    return sample(scheduler, start(dtype))


def ours(**config: Any) -> DCSolverScheduler:
    return DCSolverScheduler(**{**SD, **config})
