"""DC-Solver: UniPC that compensates its stored outputs by one ratio per step (arXiv 2409.03755)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

# Diffusers loads a saved foreign scheduler only if its module has an attribute named SchedulerMixin.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.configuration_utils import register_to_config

from diffplug.samplers.dc_solver.ratios import RatioBook
from diffplug.samplers.schedule.grids import named_grid
from diffplug.samplers.schedule.schedule import COMPENSATION_VARIABLES, SolverSchedule
from diffplug.samplers.schedule.steps import MAX_DC_ORDER, check_step_count, checked_ratios
from diffplug.samplers.solver.idle_options import refuse_idle
from diffplug.samplers.solver.scheduler import CLIPPING, SolverScheduler
from diffplug.samplers.solver.unipc_options import (
    bound_options,
    constructor_signature,
    defaults_of,
    with_signature,
)

CHANGED_DEFAULTS: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "bh2",
    "final_sigmas_type": "sigma_min",
    "disable_corrector": [0],
}
OWN_DEFAULTS: dict[str, Any] = {
    **{"dc_ratios": None, "dc_order": 2, "dc_variable": "timestep", "grid": None},
    **CLIPPING,
}
CONSTRUCTOR = constructor_signature(CHANGED_DEFAULTS, OWN_DEFAULTS)


class DCSolverScheduler(SolverScheduler):
    """A Diffusers scheduler that samples with DC-Solver; without ratios it is UniPC.

    Takes every option of `UniPCMultistepScheduler`, and six more:
      dc_ratios: one number per step, searched for one model, step count and guidance scale; 1.0 changes
        nothing, more than 1 extrapolates towards less noise. Ratio i belongs to node i of the grid, also when
        a run starts later (img2img). None: no compensation. Or several, as `RatioBook.to_config` tells them:
        a run takes those of its steps and of the guidance that the plug `DCSolver` tells it.
      dc_order: K in 1..3; a compensation mixes the last K + 1 outputs, so the first K ratios have to be 1.
      dc_variable: "timestep" (the paper's) or "lambda" (log alpha - log sigma): the variable of the
        interpolation.
      grid: name of a grid (`grids.GRIDS`); None: what UniPC's options say.
      clip_sample, clip_sample_range: see `SolverScheduler`.

    Defaults that differ from UniPC's: disable_corrector=[0], final_sigmas_type="sigma_min" (flow models keep
    "zero": their grid has no smallest sigma, and UniPC would repeat the last one and waste an evaluation).
    Flow models are told their exact, fractional timesteps (UniPC cuts them to integers). UniPC computes its
    numbers in float32 and here they are float64: results differ by the rounding of UniPC's. Raises ValueError
    for options that contradict each other or would silently do nothing.
    """

    constructor = CONSTRUCTOR

    @register_to_config
    @with_signature(CONSTRUCTOR)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options, given = bound_options(CONSTRUCTOR, args, kwargs)
        _check_options(options)
        refuse_idle(options, given, defaults_of(CONSTRUCTOR))
        ratios = options["dc_ratios"]
        if not isinstance(ratios, Mapping):
            ratios = checked_ratios(ratios, options["dc_order"])
        self._read: tuple[Any, RatioBook | None] = None, None
        self._set_up(options, OWN_DEFAULTS)
        self.register_to_config(dc_ratios=ratios)
        self._ratio_book()

    def _schedule(self, steps: int, *, given: bool, begin: int = 0) -> SolverSchedule:
        """UniPC's decisions with the ratios; those before the run begins do nothing."""
        plain = super()._schedule(steps, given=given, begin=begin)
        ratios, _ = self._ratios(steps)
        if ratios is None:
            return plain
        check_step_count(ratios, steps)
        decided = tuple(replace(step, ratio=ratio) for step, ratio in zip(plain.steps, ratios, strict=True))
        return replace(plain, steps=decided, compensation=(self.config.dc_order, self.config.dc_variable))

    def _ratio_book(self) -> RatioBook | None:
        """The book in the configuration, parsed when it changes; None where there is one list, or nothing."""
        told = self.config.dc_ratios
        if self._read[0] is not told:
            book = RatioBook.from_config(told, self.config.dc_order) if isinstance(told, Mapping) else None
            self._read = told, book
        return self._read[1]

    def _ratios(self, steps: int) -> tuple[Sequence[float] | None, str]:
        """(the ratios of a run, what is not exact about them or "")."""
        book = self._ratio_book()
        if book is None:
            return self.config.dc_ratios, ""
        try:
            return book.choose(steps, self.request.guidance)
        except ValueError as error:
            if self.config.dc_ratios["elsewhere"] == "refuse":
                raise
            return None, f"{error}; run without compensation"

    def _tell(self, steps: int) -> None:
        """Warn where a run gets other ratios than a person may think."""
        _, note = self._ratios(steps)
        if note:
            warnings.warn(note, stacklevel=4)


def _check_options(options: dict[str, Any]) -> None:
    order, variable = options["dc_order"], options["dc_variable"]
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_DC_ORDER:
        raise ValueError(f"dc_order={order!r}: allowed are 1 to {MAX_DC_ORDER}, the paper uses 2")
    if variable not in COMPENSATION_VARIABLES:
        allowed = " and ".join(map(repr, COMPENSATION_VARIABLES))
        raise ValueError(f"dc_variable={variable!r}: allowed are {allowed}")
    if options["grid"] is not None:
        named_grid(options["grid"])
    if options["use_flow_sigmas"] and not options["predict_x0"]:
        raise ValueError(
            "predict_x0=False starts a flow model from noise without any signal: use predict_x0=True"
        )
