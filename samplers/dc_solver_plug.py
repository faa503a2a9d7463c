"""DCSolver: the plug that samples a pipeline with DC-Solver and puts the old scheduler back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from diffplug.samplers.dc_solver import CONSTRUCTOR, DCSolverScheduler
from diffplug.samplers.fitted import check_names, fitted
from diffplug.scheduler_plug import current_scheduler, swap, world

RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "solver_order": 2,
        "solver_type": "bh2",
        "solver_p": None,
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [0],
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    }
)
LAST_SIGMA = {True: "zero", False: "sigma_min"}  # of flow models, of all others


@dataclass(frozen=True, init=False)
class DCSolver:
    """A plug that swaps a pipeline's scheduler for a `DCSolverScheduler` on the method's own grid.

    ratios: one number per step (see `DCSolverScheduler`), or None for none. config: any other option of
    `DCSolverScheduler`. What is not given comes from the method's recipe (order 2, bh2, no corrector after
    the first step, evenly spaced timesteps down to the smallest sigma; flow models: down to 0), then from
    the pipeline's own scheduler (noise schedule, prediction type, shift, thresholding). Ratios hold for one
    model, step count, guidance scale and grid.

    Raises ValueError at once for unknown options and bad values, and on attaching to a pipeline without a
    scheduler or with noise levels that UniPC cannot express. Source: arXiv 2409.03755.
    """

    slot: ClassVar[str] = "scheduler"

    ratios: tuple[float, ...] | None
    config: Mapping[str, Any]

    def __init__(self, ratios: Any = None, **config: Any) -> None:
        check_names("DCSolver", config, CONSTRUCTOR, "dc_ratios")
        checked = DCSolverScheduler(dc_ratios=ratios, **config).config.dc_ratios
        object.__setattr__(self, "ratios", None if checked is None else tuple(checked))
        object.__setattr__(self, "config", MappingProxyType(dict(config)))

    def scheduler_for(self, pipe: Any) -> DCSolverScheduler:
        """A new scheduler for the pipeline's model; the pipeline is left alone."""
        last = LAST_SIGMA[world(current_scheduler(pipe)) == "flow matching"]
        ratios = None if self.ratios is None else list(self.ratios)
        options = {**RECIPE, "final_sigmas_type": last, **self.config, "dc_ratios": ratios}
        scheduler: DCSolverScheduler = fitted(DCSolverScheduler, pipe, **options)
        return scheduler

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Replace `pipe.scheduler`; returns the function that puts the very same object back."""
        return swap(pipe, self.scheduler_for(pipe))
