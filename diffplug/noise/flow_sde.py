"""SDE-DPM-Solver++ for flow-matching models with a fixed shift, in pipelines that pass `mu` (FLUX)."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    SchedulerMixin,  # noqa: F401  # Diffusers looks for it in the module of a saved scheduler
)


class FixedShiftSDEScheduler(DPMSolverMultistepScheduler):
    """DPMSolverMultistepScheduler that passes over `mu` where its configuration has no dynamic shifting.

    FLUX.1-schnell's configuration has none, and FluxPipeline hands `mu` over all the same.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        mu: float | None = None,
        **given: Any,
    ) -> None:
        """Set the steps; arguments as in the parent class."""
        moving = mu if self.config.use_dynamic_shifting else None
        super().set_timesteps(num_inference_steps, device=device, mu=moving, **given)
