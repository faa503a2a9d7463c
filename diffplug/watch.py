"""Around a whole run: `Watch` tells steps and stops where latents are no numbers, `quiet` hides the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from diffplug import noise
from diffplug.intercept import StepCall, StepInterceptor, Undo, current_scheduler, intercept_step

__all__ = ["Watch", "quiet"]

CURE = "lower --guidance, or try --dtype float32 or bfloat16; if that does not help, the weights are damaged"


class Watch(StepInterceptor):
    """Tell `told(done, of)` after every step of a run, and raise ValueError for latents that are no numbers.

    particles: rows of one picture. A picture is lost when none of its rows is finite; single particles may
    die, for steerers drop those. On the CPU a lost picture stops the run at its step; an accelerator is not
    waited for, and `finish`, called after the run, tells the step.
    """

    first = True  # sees what the pipeline gets, whatever steerers made of it

    def __init__(self, told: Callable[[int, int], None] | None = None, *, particles: int = 1) -> None:
        self.told, self.particles = told, particles
        self.done = 0
        self._seen: list[tuple[str, Tensor]] = []

    def attach(self, pipe: Any) -> Undo:
        """Return a function that takes the watch off the pipeline's scheduler."""
        return intercept_step(current_scheduler(pipe), self)

    def on_set_timesteps(self, scheduler: Any) -> None:
        self.done = 0

    def on_step(self, call: StepCall) -> Any:
        result = call.run()
        self.done += 1
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        if isinstance(sample, Tensor) and sample.is_floating_point():
            self._look(call, sample)
        if self.told is not None:
            self.told(self.done, max(self.done, len(call.scheduler.timesteps)))
        return result

    def _look(self, call: StepCall, sample: Tensor) -> None:
        lost = _lost(sample.detach(), self.particles)
        if sample.device.type != "cpu":
            self._seen.append((self._place(call), lost))
        elif bool(lost):
            raise _not_finite(self._place(call))

    def _place(self, call: StepCall) -> str:
        """Return the step that was just taken, with its noise over signal where the scheduler says it."""
        with suppress(ValueError, AttributeError, IndexError, TypeError):
            level = noise.level(call.scheduler, step_index=self.done - 1)
            if level.alpha > 0:
                return f"step {self.done} (sigma {level.sigma / level.alpha:.3g})"
        return f"step {self.done}"

    def finish(self) -> None:
        """Raise ValueError where a step of the run lost a picture."""
        seen, self._seen = self._seen, []
        for place, lost in seen:
            if bool(lost):
                raise _not_finite(place)


def _lost(sample: Tensor, particles: int) -> Tensor:
    """Return one truth value, on the device: some picture has no particle that is finite."""
    fine = torch.isfinite(sample.flatten(1)).all(1)
    if len(fine) % particles == 0:
        fine = fine.reshape(-1, particles)
    return ~fine.reshape(len(fine), -1).any(1).all()


def _not_finite(place: str) -> ValueError:
    return ValueError(f"latents are not finite after {place}: {CURE}")


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """A block in which the pipeline draws no progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
