"""Problems whose errors are chosen: what a schedule scores is looked up, not computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.problem import Run


@dataclass
class Planted:
    """n pairs with converged samples 0 and final ones [n, 12] that `off(schedule)` [n] says: 3x2x2 pictures.

    rows: which pairs are here. runs: how many pairs were run so far, in all parts together.
    """

    off: Callable[[SolverSchedule], Any]
    levels: NoiseLevels
    rows: Any = field(default_factory=lambda: slice(None))
    runs: list[int] = field(default_factory=lambda: [0])
    n: int = 128

    @property
    def evaluations(self) -> int:
        return self.runs[0]

    @property
    def truth(self) -> Any:
        return np.zeros((self.n, 12))[self.rows]

    def final(self, schedule: SolverSchedule) -> Any:
        off = np.asarray(self.off(schedule), dtype=np.float64)[self.rows]
        self.runs[0] += len(off)
        return np.tile(off[:, None], (1, 12))

    def run(self, schedule: SolverSchedule) -> Run:
        raise NotImplementedError

    def truth_states(self, schedule: SolverSchedule) -> Any:
        raise NotImplementedError

    def part(self, begin: int, end: int) -> Planted:
        return Planted(self.off, self.levels, slice(begin, end), self.runs, self.n)

    @property
    def prompts(self) -> list[str]:
        return ["a thing"] * len(self.truth)

    def pictures(self, final: Any) -> Tensor:
        return torch.from_numpy(final).float().reshape(-1, 3, 2, 2) + 0.5
