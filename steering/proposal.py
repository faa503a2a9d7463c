"""A proposal: what changes the steps of scored calls after the selection. The default changes nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffplug.intercept import StepCall


class Proposal:
    """Base of proposals; the engine calls `begin` once a run, and the others in the order below."""

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Prepare for a run of this many prompts, with these slots of each."""

    def before(self, call: StepCall, x0: Tensor, progress: float) -> None:
        """Look at a scored call, its particles moved already; x0: their clean predictions `[n, ...]`,
        progress: share of the run done.
        """

    def after(self, call: StepCall, result: Any) -> Any:
        """Return what the step returns, at every call of the run."""
        return result

    def log_ratio(self) -> Tensor | None:
        """Return log p/tau `[n]` of the last step for the weights; None where it was the solver's own."""
        return None


def stepped(result: Any) -> Tensor:
    """Return the next sample of a step's result, tuple or output."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def replaced(result: Any, x: Tensor) -> Any:
    """Return a step's result with another next sample."""
    if isinstance(result, tuple):
        return (x, *result[1:])
    result.prev_sample = x
    return result
