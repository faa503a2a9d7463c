"""What stands around the calls and steps of a pipeline while a few-step checkpoint is on it."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffplug.call_arguments import asked
from diffplug.intercept import PipelineCall, StepCall, StepInterceptor, current_scheduler, original_class
from diffplug.samplers.few_step.adapter import set_strength
from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.checkpoint import Installed
from diffplug.samplers.few_step.families import unwrapped
from diffplug.samplers.few_step.grids import OWN, Grid, grid_of, is_free
from diffplug.samplers.few_step.guidance import (
    check_guidance,
    check_negative,
    guidance_call,
    parameters,
    refuse_guidance,
)
from diffplug.samplers.few_step.schedule import takes_eta

STEPS = "num_inference_steps"


class FewStepSteps(StepInterceptor):
    """Gives the scheduler its grid where the pipeline cannot, eta where it does not, and limits the LoRA."""

    def __init__(
        self,
        row: Row,
        pipe: Any,
        installed: Sequence[Installed],
        part: tuple[float, float],
        eta: float | None,
    ) -> None:
        self.row, self.pipe, self.installed, self.part = row, pipe, installed, part
        self.eta = row.eta if eta is None else eta
        self.grid: Grid = OWN
        self._setting = False
        self._done = 0

    def needed(self, whole: bool, schedule: bool) -> bool:
        """Whether anything has to be done at the steps of this pipeline."""
        scheduler = current_scheduler(self.pipe)
        blind = self.eta is not None and takes_eta(scheduler) and "eta" not in parameters(self.pipe)
        return not whole or (
            schedule and (blind or not self.by_argument(grid_of(self.row, self.row.default_steps)))
        )

    def by_argument(self, grid: Grid) -> bool:
        """Whether the pipeline hands a grid on to its scheduler, or there is none to be handed.

        A scheduler that takes no list (Euler ancestral) has its spacing in its configuration.
        """
        if not grid.argument or not _takes(current_scheduler(self.pipe), grid.argument):
            return True
        return grid.argument in parameters(self.pipe)

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Replace the timesteps that were set by those of the row; begin with the LoRA on or off."""
        self._done = 0
        if self.grid.argument and not self._setting:
            self._setting = True
            try:
                own = original_class(scheduler).set_timesteps
                own(
                    scheduler, **{self.grid.argument: self.grid.given(), "device": scheduler.timesteps.device}
                )
            finally:
                self._setting = False
        self._limit(len(scheduler.timesteps))

    def on_step(self, call: StepCall) -> Any:
        """Take the step with the row's eta, then switch the LoRA for the next one."""
        if self.eta is not None and takes_eta(call.scheduler) and "eta" not in call.kwargs:
            call.kwargs["eta"] = self.eta
        result = call.run()
        self._done += 1
        self._limit(len(call.scheduler.timesteps))
        return result

    def _limit(self, steps: int) -> None:
        """Switch the LoRA on or off for the step that comes."""
        if self.part == (0.0, 1.0):
            return
        inside = self.part[0] <= self._done / steps < self.part[1]
        for each in self.installed:
            module = unwrapped(getattr(self.pipe, each.component))
            set_strength(module, each.strength if inside else 0.0)


class FewStepCall:
    """Fills in the arguments of a call, and refuses or tells of those that contradict the row."""

    def __init__(
        self,
        row: Row,
        pipe: Any,
        steps: int | None,
        guidance: float | None,
        eta: float | None,
        stepper: FewStepSteps | None,
    ) -> None:
        self.row, self.pipe, self.steps, self.guidance, self.stepper = row, pipe, steps, guidance, stepper
        self.eta = row.eta if eta is None else eta

    def __call__(self, call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        """Run the pipeline with the row's arguments; what the person gave stays where it is allowed."""
        filled = {**self._guided(kwargs), **self._scheduled(kwargs)}
        with _quiet_about_lists(current_scheduler(self.pipe)):
            return call(**{**kwargs, **filled})

    def check_call(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for arguments that a call of the pipeline will be refused for."""
        refuse_guidance(self.row, self.pipe, kwargs, guidance_call(self.row, self.pipe, self.guidance))
        if self.stepper is not None:
            self._evaluations(kwargs)

    def _guided(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return guidance and the row's further arguments, where the person gave none."""
        wanted = guidance_call(self.row, self.pipe, self.guidance)
        check_negative(self.row, self.pipe, kwargs, self.guidance)
        check_guidance(self.row, self.pipe, kwargs, wanted)
        off = self.row.guidance == "off" and self.guidance is None
        filled = {name: value for name, value in wanted.items() if off or kwargs.get(name) is None}
        takes = parameters(self.pipe)
        extra = {name: value for name, value in self.row.call.items() if name in takes and name not in kwargs}
        return {**filled, **extra}

    def _scheduled(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return steps, grid and eta of a call; empty where another plug has the schedule."""
        if self.stepper is None:
            return {}
        filled: dict[str, Any] = {}
        takes_noise = "eta" in parameters(self.pipe) and takes_eta(current_scheduler(self.pipe))
        if self.eta is not None and takes_noise and kwargs.get("eta") is None:
            filled["eta"] = self.eta
        given = next((name for name in ("timesteps", "sigmas") if kwargs.get(name) is not None), None)
        if given is not None:
            self.stepper.grid = OWN
            warnings.warn(f"{given} of the call replace those of {self.row.name}", stacklevel=5)
            return filled
        steps, grid, extra = self._grid(kwargs)
        self.stepper.grid = OWN if self.stepper.by_argument(grid) else grid
        if grid.argument in parameters(self.pipe) and _takes(current_scheduler(self.pipe), grid.argument):
            filled[grid.argument] = grid.given()
        return {**filled, **extra, STEPS: steps}

    def _grid(self, kwargs: dict[str, Any]) -> tuple[int, Grid, dict[str, Any]]:
        """Return the scheduler's number of steps, the grid, and a strength that has to be corrected."""
        wanted = self._evaluations(kwargs)
        if "strength" not in parameters(self.pipe):
            return wanted, grid_of(self.row, wanted), {}
        strength = float(asked(self.pipe, kwargs, "strength"))
        if kwargs.get("strength") is None and strength > 0.999:  # SDXL inpainting: 0.9999 would lose a step
            return wanted, grid_of(self.row, wanted), {"strength": 1.0}
        steps = self._stretched(wanted, strength)
        return steps, grid_of(self.row, steps), {}

    def _evaluations(self, kwargs: dict[str, Any]) -> int:
        """Return the number of evaluations that is asked for."""
        asked_for = kwargs.get(STEPS)
        if asked_for is None:
            return self.row.default_steps if self.steps is None else self.steps
        if self.steps is not None and asked_for != self.steps:
            raise ValueError(
                f"{STEPS}={asked_for}, but {self.row.name} is plugged in for {self.steps} steps: leave it "
                f"out, or plug FewStep(..., steps={asked_for})"
            )
        if asked_for not in self.row.steps:
            numbers = ", ".join(map(str, self.row.steps))
            near = min(self.row.steps, key=lambda n: (abs(n - asked_for), n))
            raise ValueError(
                f"{STEPS}={asked_for}: {self.row.name} was made for {numbers} steps; the nearest is {near}"
            )
        return int(asked_for)

    def _stretched(self, wanted: int, strength: float) -> int:
        """Return how many steps of a whole run a partial one is cut from.

        Rows that serve any number get as many as it takes for `wanted` evaluations; those that were trained
        on a list run the part of it that lies below the strength.
        """
        if not 0 < strength <= 1:
            return wanted  # the pipeline refuses it
        if is_free(self.row):
            steps = wanted
            while int(steps * strength) < wanted:
                steps += 1
            return steps
        left = int(wanted * strength)
        if left < 1:
            raise ValueError(
                f"strength={strength:g} of {wanted} steps leaves none to run: {self.row.name} needs a "
                f"strength of at least {math.ceil(1000 / wanted) / 1000:g}"
            )
        if left < wanted:
            warnings.warn(
                f"strength={strength:g}: {self.row.name} runs the last {left} of its {wanted} steps, which "
                "it was trained on",
                stacklevel=7,
            )
        return wanted


def _takes(scheduler: Any, argument: str) -> bool:
    """Whether a scheduler's set_timesteps has this argument."""
    return argument in inspect.signature(original_class(scheduler).set_timesteps).parameters


@contextmanager
def _quiet_about_lists(scheduler: Any) -> Iterator[None]:
    """Diffusers' warning of timesteps off its own list is off inside the block: the lists here are meant."""
    logger = logging.getLogger(original_class(scheduler).__module__)
    parents = [logging.getLogger(cls.__module__) for cls in original_class(scheduler).__mro__[:-1]]
    loggers = {id(each): each for each in (logger, *parents)}.values()
    for each in loggers:
        each.addFilter(_not_about_lists)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(_not_about_lists)


def _not_about_lists(record: logging.LogRecord) -> bool:
    return "custom timestep schedule" not in str(record.msg)
