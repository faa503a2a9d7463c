"""DCSolver: the plug that samples a pipeline with DC-Solver and puts the old scheduler back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from diffplug.intercept import Undo, current_scheduler
from diffplug.samplers.dc_solver.ratios import RatioBook
from diffplug.samplers.dc_solver.scheduler import CONSTRUCTOR, DCSolverScheduler
from diffplug.samplers.fingerprint import check_origin
from diffplug.samplers.solver.around_call import AroundCall
from diffplug.samplers.solver.attach import check_names, fitted, remade
from diffplug.scheduler.plug import plugged_in, world

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
ELSEWHERE = ("refuse", "neutral")
ON_OWN_GRIDS = "the DC ratios were searched on the method's own grid, this call brings another"
LAST_SIGMA = {True: "zero", False: "sigma_min"}  # of flow models, of all others


@dataclass(frozen=True, init=False)
class DCSolver:
    """A plug that swaps a pipeline's scheduler for a `DCSolverScheduler` on the method's own grid.

    ratios: one number per step (see `DCSolverScheduler`); or ratios for several numbers of steps and guidance
    scales, of which every call of the pipeline gets its own: {(steps, guidance): ratios}, searched schedules,
    a `CompensationPolynomial`, the path of a file with any of these (also the reference's lists and `.npy`),
    or "shapes" for those that come with the package; or None for none. elsewhere: what calls get for whose
    steps there are no ratios: "refuse", or "neutral" ratios of 1 with a warning.

    config: any other option of `DCSolverScheduler`. What is not given comes from the method's recipe (order
    2, bh2, no corrector after the first step, evenly spaced timesteps down to the smallest sigma; flow
    models: down to 0), then from the pipeline's own scheduler (noise schedule, prediction type, shift,
    thresholding). Ratios hold for one model, step count, guidance scale and grid: a warning says where the
    guidance or the model's weights are not those of the search.

    Raises ValueError at once for unknown options and bad values, on attaching to a pipeline without a
    scheduler, with noise levels that UniPC cannot express, or of another model than the files' (where they
    say so). Source: arXiv 2409.03755.
    """

    slot: ClassVar[str] = "scheduler"

    book: RatioBook
    elsewhere: str
    config: Mapping[str, Any]

    def __init__(self, ratios: Any = None, *, elsewhere: str = "refuse", **config: Any) -> None:
        check_names("DCSolver", config, CONSTRUCTOR, "dc_ratios")
        if elsewhere not in ELSEWHERE:
            raise ValueError(f"elsewhere={elsewhere!r}: allowed are {' and '.join(map(repr, ELSEWHERE))}")
        order = DCSolverScheduler(**config).config.dc_order
        object.__setattr__(self, "book", RatioBook.of(ratios, order))
        object.__setattr__(self, "elsewhere", elsewhere)
        object.__setattr__(self, "config", MappingProxyType(dict(config)))

    def __reduce__(self) -> Any:
        return remade, (type(self), {"book": self.book, "elsewhere": self.elsewhere}, dict(self.config))

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """The ratios, where there is one list of them."""
        return None if self.book.single is None else tuple(self.book.single)

    def scheduler_for(self, pipe: Any) -> DCSolverScheduler:
        """A new scheduler for the pipeline's model; the pipeline is left alone."""
        last = LAST_SIGMA[world(current_scheduler(pipe)) == "flow matching"]
        ratios = self.book.to_config(self.elsewhere)
        options = {**RECIPE, "final_sigmas_type": last, **self.config, "dc_ratios": ratios}
        scheduler: DCSolverScheduler = fitted(DCSolverScheduler, pipe, **options)
        return scheduler

    def attach(self, pipe: Any) -> Undo:
        """Replace `pipe.scheduler`; returns the function that puts the very same object back."""
        scheduler = self.scheduler_for(pipe)
        check_origin("DC ratios", self.book.metas, pipe)
        return plugged_in(pipe, scheduler, AroundCall(ON_OWN_GRIDS if self.book.metas else ""))
