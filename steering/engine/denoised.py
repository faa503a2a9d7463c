"""The clean prediction at a call: latents by the scheduler's own mathematics, tokens by likeliest code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall
from diffplug.noise.families import Level, Reading, next_level, reading
from diffplug.steering.engine.rule import ScoredStep


@dataclass(frozen=True)
class StepNoise:
    """What a scheduler says of one of its steps: how x0 is read from it, and the level that it leads to.

    position: its place in `scheduler.timesteps`. timestep: the entry there.
    """

    reading: Reading
    there: Level
    position: int
    timestep: float

    def is_for(self, call: StepCall) -> bool:
        """Return whether the scheduler stands where this was read."""
        standing = getattr(call.scheduler, "step_index", self.position)
        return standing == self.position and bool((torch.as_tensor(call.timestep) == self.timestep).all())


def noise_ahead(scheduler: Any, start: int, calls: Iterable[int]) -> dict[int, StepNoise]:
    """Return what the scheduler will say of these calls of a run that begins at step `start`.

    All numbers come from the host's tables, so that a scored step computes none. PNDM is left out: it counts
    by itself and looks at one timestep twice. Raises ValueError for a scheduler whose levels are not known.
    """
    if hasattr(scheduler, "counter"):
        return {}
    times = scheduler.timesteps.tolist()
    return {
        call: StepNoise(
            reading=reading(scheduler, step_index=start + call),
            there=next_level(scheduler, step_index=start + call),
            position=start + call,
            timestep=times[start + call],
        )
        for call in calls
    }


def scored_step(call: StepCall, index: int, steps: int, ahead: Mapping[int, StepNoise]) -> ScoredStep:
    """Return a call as a value: its clean prediction, and the noise before and after the step.

    ahead: what `noise_ahead` read; a call that is not there, or elsewhere in the schedule, is read now.
    """
    progress = (index + 1) / max(steps, index + 1)
    here = there = None
    if not call.sample.is_floating_point():
        x0 = likeliest_tokens(call)
    else:
        noise = ahead.get(index)
        if noise is not None and noise.is_for(call):
            now, there = noise.reading, noise.there
        else:
            now, there = reading(call.scheduler, call.timestep), next_level(call.scheduler, call.timestep)
        here, x0 = now.level, now.clip(now.raw(call.model_output, call.sample))
    return ScoredStep(call=call, index=index, steps=steps, progress=progress, x0=x0, here=here, there=there)


def likeliest_tokens(call: StepCall) -> Tensor:
    """Return the tokens of a call with the likeliest code at masked places."""
    masked = call.sample == call.scheduler.config.mask_token_id
    codes = call.model_output.argmax(1 if call.sample.ndim == 3 else -1)
    return torch.where(masked, codes, call.sample)
