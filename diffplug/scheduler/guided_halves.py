"""Pipelines that hand both halves of a guided batch to the scheduler: one half is stepped for both."""

from __future__ import annotations

from typing import Any

import torch

from diffplug.intercept import StepCall, StepInterceptor, original_class


def steps_both_halves(pipe: Any) -> bool:
    """Return whether a pipeline's steps see guided batches twice over (DiT)."""
    return any(cls.__name__ == "DiTPipeline" for cls in original_class(pipe).__mro__)


class HalvedSteps(StepInterceptor):
    """Shows interceptors and the scheduler the first of two equal halves; the pipeline gets it for both.

    rows: how many pictures there are; a batch of another size is left as it is.
    """

    first = True

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result of one half, twice."""
        n = self.rows
        if len(call.sample) != 2 * n or not torch.equal(call.sample[:n], call.sample[n:]):
            return call.run()
        call.sample, call.model_output = call.sample[:n], call.model_output[:n]
        result = call.run()
        if isinstance(result, tuple):
            return (torch.cat([result[0], result[0]]), *result[1:])
        result.prev_sample = torch.cat([result.prev_sample, result.prev_sample])
        return result
