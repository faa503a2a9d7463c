"""What a crowd hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from diffplug.steering.report import SteeringReport


@dataclass(frozen=True, kw_only=True, eq=False)
class CrowdResult:
    """The end of a steered loop: P groups of k particles.

    all: what `clean` made of every particle, `[P * k]` in slot order. state: the final state, rows alike.
    rewards, log_weights `[P, k]`, log_z `[P]`: as in the report. best_rows: by group, the row of the highest
    reward. report: a SteeringReport without network figures, since the loop calls its own.
    """

    all: Any
    state: Any
    best_rows: list[int]
    report: SteeringReport
    _drawn: list[int] | None = field(default=None, repr=False)

    @property
    def best(self) -> Any:
        """Return the result with the highest reward of each group, `[P]`."""
        return picked(self.all, self.best_rows)

    @property
    def has_weights(self) -> bool:
        """Return whether the rule leaves weights to draw by."""
        return self._drawn is not None

    @property
    def sample_rows(self) -> list[int]:
        """Return, by group, a row drawn by the final weights. Raises ValueError for rules without any."""
        if self._drawn is None:
            raise ValueError(
                f"{self.report.method} has no weights to draw by: take .best or .all, or use FeynmanKac"
            )
        return self._drawn

    @property
    def sample(self) -> Any:
        """Return one result of each group, drawn by the final weights: from the tilted law, `[P]`."""
        return picked(self.all, self.sample_rows)

    @property
    def rewards(self) -> Tensor:
        """Return the final rewards, `[P, k]`."""
        return self.report.final_rewards

    @property
    def log_weights(self) -> Tensor:
        """Return the final log weights, `[P, k]`."""
        return self.report.final_log_weights

    @property
    def log_z(self) -> Tensor:
        """Return the estimates of log E[exp(strength * reward)] of the unsteered loop, `[P]`."""
        return self.report.log_z


def picked(items: Any, rows: Sequence[int]) -> Any:
    """Return some of the items: a tensor of a tensor, a list of anything else."""
    return items[list(rows)] if isinstance(items, (Tensor, np.ndarray)) else [items[row] for row in rows]
