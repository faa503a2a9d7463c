"""Duplicates that stay identical: the step that should have parted them added no noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from diffplug.steering.engine.history import Rows

_SOLVERS = (
    "leave out proposal=None (proposal='auto' adds noise at the scored calls of most solvers), or use a "
    "stochastic one, such as DDIMScheduler with eta=1, EulerAncestralDiscreteScheduler, or "
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' (diffplug.steering.stochastic)"
)


class DuplicateWatch:
    """Warns once when duplicates are still identical after the step that should have parted them.

    strict: raise ValueError instead, for rules that are nothing without noise. advice: where noise comes
    from, in words. Tokens are not looked at: few of them may be equal by chance. Costs one comparison of the
    duplicated rows, until the first warning.
    """

    def __init__(self, *, strict: bool = False, advice: str = _SOLVERS) -> None:
        self.strict, self.advice = strict, advice
        self.warned = False
        self.rows: Rows | None = None

    def note(self, rows: Rows | None) -> None:
        """Remember which rows continue from others; None = nothing was duplicated at this call."""
        self.rows = rows if rows is not None else self.rows

    def look(self, name: str, after: Iterable[Tensor]) -> None:
        """Compare rows after a step with those they continue from (survivors keep their slots).

        name: what made the step. after: the parts of the new state, all rows of each.
        """
        if self.warned or self.rows is None:
            return
        rows, self.rows = self.rows, None
        parts = [part for part in after if part.is_floating_point()]
        if parts and rows.everywhere(all(torch.equal(part, rows.take(part)) for part in parts)):
            self._tell(name)

    def _tell(self, name: str) -> None:
        said = f"{name} added no noise after a selection, so"
        if self.strict:
            raise ValueError(
                f"{said} all candidates of a group are the same and there is nothing to choose from: "
                f"{self.advice}; or take BestOfN or NoiseSearch, which work with every solver"
            )
        self.warned = True
        warnings.warn(
            f"{said} duplicated particles stay identical to the end and steering explores little: "
            f"{self.advice}",
            stacklevel=4,
        )
