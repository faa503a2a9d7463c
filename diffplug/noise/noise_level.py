"""Signal and noise of a state before and after a scheduler's step, in the scheduler's own latent convention.

One pair of functions per family of schedulers: ``*_here`` gives the level of the sample that ``step``
receives, and ``*_there`` the level of the sample it gives back. ``diffplug.noise`` lists the families and
their conventions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """Signal ``alpha`` and noise ``sigma`` of a state x = alpha x0 + sigma eps; finite and at least 0."""

    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.sigma < math.inf):
            raise ValueError(
                f"a level needs finite alpha >= 0 and sigma >= 0, got {self.alpha} and {self.sigma}"
            )

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio (alpha / sigma)^2, infinite for a clean state."""
        return math.inf if self.sigma == 0 else (self.alpha / self.sigma) ** 2

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log alpha - log sigma; infinite at the ends."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


CLEAN = Level(1.0, 0.0)
