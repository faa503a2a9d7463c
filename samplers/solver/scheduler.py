"""SolverScheduler: a Diffusers scheduler that runs a solver's table."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

# Diffusers loads a saved foreign scheduler only if its module has an attribute named SchedulerMixin.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from diffplug.noise.prediction import config_mix
from diffplug.noise.solver import solver_bound
from diffplug.samplers.model_noise import Floats, NoiseLevels
from diffplug.samplers.schedule.book import ScheduleBook
from diffplug.samplers.schedule.grids import named_grid
from diffplug.samplers.schedule.presets import check_options
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.around_call import AroundCall
from diffplug.samplers.solver.call_request import refuse_ddim_options
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.idle_options import refuse_idle
from diffplug.samplers.solver.run_decisions import DecidingScheduler
from diffplug.samplers.solver.run_grid import (
    RunGrid,
    check_apart,
    flow_grid,
    given_grid,
    rounded,
    schedule_grid,
)
from diffplug.samplers.solver.statistics import load_statistics
from diffplug.samplers.solver.table import AnalyticStep, SolverTable, advance
from diffplug.samplers.solver.unipc_options import (
    bound_options,
    check_unipc,
    constructor_signature,
    defaults_of,
    with_signature,
)
from diffplug.samplers.solver.user_grid import check_length, check_request, is_pipeline_default
from diffplug.scheduler.options import FLOW_GRIDS

CLIPPING: dict[str, Any] = {"clip_sample": False, "clip_sample_range": 1.0}
OWN_DEFAULTS: dict[str, Any] = {
    **{"schedules": None, "solver": None, "solver_options": None, "grid": None},
    **CLIPPING,
}
CONSTRUCTOR = constructor_signature({}, OWN_DEFAULTS)
WIDE = (torch.float32, torch.float64)


class SolverScheduler(DecidingScheduler):
    """A Diffusers scheduler for any solver that is linear in states and predictions.

    Takes every option of `UniPCMultistepScheduler`, and six more:
      schedules: a `SolverSchedule` (or its JSON), or several for different numbers of evaluations and, by
        meta["guidance_scale"], for different guidance. The plug `Solver` tells a run its guidance.
      solver: name of a preset (`presets.PRESETS`) for runs without a schedule; None means "unipc" with
        UniPC's own options (solver_order, ...), or, where there are schedules, to refuse other runs.
      solver_options: keywords of that preset. grid: name of a grid (`grids.GRIDS`) for it; None: what
        UniPC's options say (timestep_spacing, use_karras_sigmas, ...).
      clip_sample, clip_sample_range: clean predictions are clamped, as Diffusers' DDPM and DDIM do.

    The grids of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas are, for flow models, those of
    `FlowMatchEulerDiscreteScheduler`: between the largest and the smallest shifted sigma. All options live
    in the configuration. A step costs one or two weighted sums with numbers that `set_timesteps` has computed
    in float64; sums are in float32 at the least. A schedule whose first step is analytic lists one timestep
    less, so that timesteps are evaluations; a pipeline has to scale its first noise by `init_noise_sigma` for
    that, which flow pipelines do not. Raises ValueError for options that contradict each other or would
    silently do nothing.
    """

    constructor = CONSTRUCTOR
    model_outputs: list[torch.Tensor]
    solver_states: list[torch.Tensor]
    seen_samples: list[torch.Tensor]

    @register_to_config
    @with_signature(CONSTRUCTOR)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options, given = bound_options(CONSTRUCTOR, args, kwargs)
        _check_solver(options)
        refuse_idle(options, given, defaults_of(CONSTRUCTOR))
        self._set_up(options, OWN_DEFAULTS)
        book = ScheduleBook.of(options["schedules"])
        self.register_to_config(schedules=book.to_config())
        self._parsed = self.config.schedules, book

    def _set_up(self, options: dict[str, Any], own: dict[str, Any]) -> None:
        check_unipc(options)
        if options["solver_p"] is not None:
            raise ValueError(
                "solver_p is another scheduler with a history of its own: choose solver= instead"
            )
        super().__init__(**{name: value for name, value in options.items() if name not in own})
        self._parsed: tuple[Any, ScheduleBook] = None, ScheduleBook()
        self._table: SolverTable = None  # type: ignore[assignment]
        self._decided: SolverSchedule | None = None
        self._hidden = 0
        self._forget()

    def around_call(self) -> AroundCall:
        """What stands around the calls of a pipeline that has this scheduler plugged."""
        return AroundCall()

    # --------------------------------------------------------------------------- a run's nodes and table

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Start a run of so many evaluations, or on a given grid; forgets everything of the run before.

        timesteps, sigmas: lists, arrays or tensors of N numbers, largest first, without the terminal node.
        Given sigmas are used as they are (in float32): sigma / alpha for VP models, sigma in (0, 1] for flow
        models. The exception is the grid 1, 1 - 1/N, ..., 1/N, which flow pipelines send by default and
        expect to be shifted. mu: strength of dynamic shifting, for flow models with use_dynamic_shifting; a
        given grid is not shifted. Raises ValueError for a grid that does not decrease, and where there is no
        schedule for so many steps.
        """
        if self.request.sigmas is not None and timesteps is None and sigmas is None:
            num_inference_steps, sigmas = None, self.request.sigmas
        check_request(num_inference_steps, timesteps, sigmas)
        levels = NoiseLevels.from_scheduler(self, mu)
        grid: RunGrid | None = None
        shifted: Floats | None = None
        if timesteps is not None or sigmas is not None:
            grid = given_grid(self, levels, timesteps, sigmas)
            check_length(num_inference_steps, len(grid.times))
            num_inference_steps = len(grid.times)
            if sigmas is not None and levels.flow and is_pipeline_default(grid.sigmas[:-1]):
                shifted = grid.sigmas[:-1].copy()
                grid = None
        assert num_inference_steps is not None  # noqa: S101 - check_request and the grid have seen to it
        self._given = grid is not None
        schedule = self._schedule(int(num_inference_steps), given=self._given)
        if not self._given:
            self._tell(int(num_inference_steps))
        if grid is None:
            grid = self._own_grid(schedule, levels, int(num_inference_steps), shifted, mu)
        self._start(schedule, levels, grid, device)

    def _own_grid(
        self, schedule: SolverSchedule, levels: NoiseLevels, steps: int, shifted: Any, mu: float | None
    ) -> RunGrid:
        """The nodes where a person gave none: the schedule's, or those of UniPC's options."""
        stored = self.book.find(steps) is not None
        if self.config.use_dynamic_shifting and mu is None and not stored:
            raise ValueError("`mu` must be passed when `use_dynamic_shifting` is set to be `True`")
        if stored or self.config.grid:
            return schedule_grid(schedule, levels)
        formula = next((name for name in FLOW_GRIDS if self.config[name]), None) if levels.flow else None
        if formula is not None:
            lowest = self._lowest_flow_sigma(levels, shifted)
            return flow_grid(formula, levels, steps, lowest, self.config.final_sigmas_type)
        if shifted is None:
            super().set_timesteps(steps, mu=mu)
        else:
            super().set_timesteps(sigmas=shifted, mu=mu)
        check_apart(self.sigmas[:-1], self.config.timestep_spacing)
        return rounded(self.sigmas, self.timesteps, levels)

    def _start(
        self, schedule: SolverSchedule, levels: NoiseLevels, grid: RunGrid, device: str | torch.device | None
    ) -> None:
        """Compile the table of the run and show its nodes; an analytic first one is not shown."""
        hidden = int(schedule.first != "model")
        if hidden and levels.flow:
            raise ValueError(
                f"the schedule's first step is analytic ({schedule.first!r}): pipelines would have to scale "
                "their first noise, and those of flow models do not; use a schedule with first='model'"
            )
        if levels.flow and grid.sigmas[0] > 1:
            raise ValueError(f"the grid starts at sigma {grid.sigmas[0]:g}, flow models end at 1")
        self._forget()
        self._run, self._decided = (levels, grid), schedule
        self._table = self._compiled(schedule)
        self._hidden = hidden
        self.init_noise_sigma = 1.0 if self._table.first is None else self._table.first.outside
        self.sigmas = torch.from_numpy(grid.sigmas[hidden:]).float()
        told = grid.times if schedule.time_shift is None else grid.times + schedule.time_shift
        self.timesteps = replace(grid, times=told[hidden:]).stored_times(levels.flow).to(device)
        self.num_inference_steps = len(self.timesteps)
        at = [config_mix(self, level) for level in self._table.levels[hidden:-1]]
        self._mixes = [(float(keep), float(gain)) for keep, gain in at]
        self._bounded = solver_bound(self) is not None

    def _compiled(self, schedule: SolverSchedule, begin: int = 0) -> SolverTable:
        levels, grid = self._run
        nodes = {"sigmas": grid.sigmas.tolist(), "times": grid.times.tolist()}
        return compile_schedule(schedule, levels, **nodes, begin=begin)

    def _forget(self) -> None:
        """Forget the run before."""
        self.model_outputs, self.solver_states, self.seen_samples = [], [], []
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._noised = self._linked = False

    @property
    def last_sample(self) -> torch.Tensor | None:
        """The newest state, from which the next one is corrected; set None where x was changed since then."""
        return self.solver_states[-1] if self._linked else None

    @last_sample.setter
    def last_sample(self, value: torch.Tensor | None) -> None:
        self._linked = value is not None

    @property
    def schedule(self) -> SolverSchedule:
        """The decisions of the run that `set_timesteps` has set up; ValueError where there is none."""
        if self._decided is None:
            raise ValueError("no run is set up: call set_timesteps first")
        return self._decided

    @property
    def table(self) -> SolverTable:
        """The numbers of the run that `set_timesteps` has set up; ValueError where there is none."""
        if self._table is None:
            raise ValueError("no run is set up: call set_timesteps first")
        return self._table

    def per_sample_state(self) -> tuple[str, ...]:
        """Names of the attributes that hold one row per sample: what particle methods have to reorder."""
        return ("model_outputs", "solver_states", "seen_samples")

    def forget_history(self) -> None:
        """Start anew at the next node where the past is no longer that of the state: noise came in between.

        A corrector is dropped in any case. Predictions keep their history if they are made from the newest
        state and data predictions alone; others (noise predictions, blocks of steps) begin at first order, as
        in a run that starts late.
        """
        self._linked = False
        begin = (self._step_index or 0) + self._hidden
        if not self._step_index or not self.table.reads_earlier_states(begin):
            return
        schedule = self._schedule(len(self.timesteps), given=self._given, begin=begin)
        self._table = self._compiled(schedule, begin)
        self._kept = self._table.kept
        self.model_outputs, self.solver_states, self.seen_samples = [], [], []

    # ------------------------------------------------------------------------------------------- stepping

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> SchedulerOutput | tuple[torch.Tensor, ...]:
        """The sample at the next node: correct, compensate the new prediction, predict.

        model_output, sample: [n, ...] of one shape; the result has the sample's dtype. Costs no network call
        and, past the first step, no device synchronisation. generator: not used, the solver adds no noise;
        some pipelines (DDPM) pass one to every scheduler, and DDIMPipeline eta and use_clipped_model_output
        as well, which have to be neutral. Raises ValueError for those, and after the last node.
        """
        if eta or use_clipped_model_output:
            refuse_ddim_options(eta, use_clipped_model_output)
        steps = self.num_inference_steps
        if steps is None:
            raise ValueError("no run is set up: call set_timesteps first")
        x = sample if sample.dtype in WIDE else sample.float()
        if self._step_index is None:
            x = self._enter(timestep, x)
        i: int = self._step_index  # type: ignore[assignment]
        if i >= steps:
            raise ValueError(
                f"all {steps} steps are done: call set_timesteps before the next run, and give every thread "
                "a pipeline of its own"
            )
        keep, gain = self._mixes[i]
        data = (
            torch.mul(model_output, gain) if keep == 0 else torch.mul(x, keep).add_(model_output, alpha=gain)
        )
        if data.dtype != x.dtype:
            data = data.to(x.dtype)
        bound = solver_bound(self) if self._bounded else None
        if bound is not None:
            data = bound(data)
        histories = (self.model_outputs, self.solver_states, self.seen_samples)
        rows = self._table.steps[i + self._hidden]
        if rows.correct is not None and not self._linked:
            rows = replace(rows, correct=None)
        x = advance(rows, histories, data, x, self._kept, bound)[1]
        self._step_index, self._linked = i + 1, True
        previous = x if x.dtype == sample.dtype else x.to(sample.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _enter(self, timestep: int | float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Begin the run at its first call: where it starts, the table from there, and an analytic step."""
        self._init_step_index(timestep)
        index: int = self._step_index  # type: ignore[assignment]
        analytic = self._analytic(index)
        begin = 0 if analytic is not None else index + self._hidden
        if begin != self._table.begin and index < len(self.timesteps):
            schedule = self._schedule(len(self.timesteps), given=self._given, begin=begin)
            if index and schedule.meta:
                warnings.warn(
                    f"the schedule for {schedule.nfe} steps begins at step {index} here (image to image): it "
                    "was searched for whole runs",
                    stacklevel=4,
                )
            self._table = self._compiled(schedule, begin)
        placed = self._table.placed(x)
        if placed is not self._table:
            self._check_statistics(x)
        self._table = placed
        self._kept = self._table.kept
        if analytic is None:
            return x
        self._linked = True
        noise = x / analytic.outside
        self.model_outputs.append(analytic.prediction(noise))
        self.solver_states.append(noise)
        if self._kept[2]:
            self.seen_samples.append(noise)
        return analytic.inside(x)

    def _check_statistics(self, x: torch.Tensor) -> None:
        """Raise ValueError for samples of another shape than the schedule's statistics are of."""
        schedule = self._schedule(len(self.timesteps), given=self._given)
        if schedule.statistics is not None and schedule.needs_statistics:
            load_statistics(schedule.statistics).check_fits(tuple(x.shape[1:]))

    def _analytic(self, index: int) -> AnalyticStep | None:
        """The analytic step that led to the first node; None for a run that starts later or was noised."""
        table = self.table
        return None if index or self._noised or table.begin else table.first

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sample itself; for the first evaluation what an analytic first step does beyond scaling it."""
        if not self._hidden or self._step_index is not None or self._begin_index:
            return sample
        analytic = self._analytic(0)
        return sample if analytic is None else analytic.inside(sample).to(sample.dtype)


def _check_solver(options: dict[str, Any]) -> None:
    if options["use_flow_sigmas"] and not options["predict_x0"]:
        raise ValueError("predict_x0=False starts a flow model from noise without any signal: leave it out")
    if options["grid"] is not None:
        named_grid(options["grid"])
    check_options(options["solver"] or "unipc", options["solver_options"])
