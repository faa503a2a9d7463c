"""Copied particles must part: a watch over what the solver returns for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from diffplug.steering.engine.ranks import Rows

ADVICE = (
    "use a stochastic one, such as DDIMScheduler with eta=1, EulerAncestralDiscreteScheduler, or "
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' (with use_flow_sigmas=True for "
    "flow models)"
)


class CopyWatch:
    """Warns once when copies are still identical after the step that should have parted them.

    strict: raise ValueError instead, for rules that are nothing without noise. Two-stage solvers are looked
    at when both stages are done, tokens not at all. Costs one comparison of the copied rows, until the first
    warning.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.warned = False
        self.restart()

    def restart(self) -> None:
        """Forget the copies of the last run."""
        self._rows: Rows | None = None

    def look(self, scheduler: Any, rows: Rows | None, result: Any) -> None:
        """Compare the rows of a step's result with the rows they continue from (survivors keep their slots).

        rows: None = no copies were made at this call.
        """
        self._rows = rows if rows is not None else self._rows
        if self.warned or self._rows is None or not getattr(scheduler, "state_in_first_order", True):
            return
        rows, self._rows = self._rows, None
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        if not after.is_floating_point():  # few tokens may be equal by chance
            return
        if rows.in_all(torch.equal(after, rows.take(after))):
            self._tell(type(scheduler).__name__)

    def _tell(self, name: str) -> None:
        if self.strict:
            raise ValueError(
                f"{name} added no noise after a selection, so all candidates of a group are the same and "
                f"there is nothing to choose from: {ADVICE}; or take BestOfN or NoiseSearch, which work with "
                "every solver"
            )
        self.warned = True
        warnings.warn(
            f"{name} added no noise after a selection, so copied particles stay identical to "
            f"the end and steering explores little: {ADVICE}",
            stacklevel=4,
        )
