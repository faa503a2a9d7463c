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
    def reference(self) -> Any:
        return np.zeros((self.n, 12))[self.rows]

    def final(self, schedule: SolverSchedule) -> Any:
        off = np.asarray(self.off(schedule), dtype=np.float64)[self.rows]
        self.runs[0] += len(off)
        return np.tile(off[:, None], (1, 12))

    def run(self, schedule: SolverSchedule) -> Run:
        raise NotImplementedError

    def reference_states(self, schedule: SolverSchedule) -> Any:
        raise NotImplementedError

    def part(self, begin: int, end: int) -> Planted:
        return Planted(self.off, self.levels, slice(begin, end), self.runs, self.n)

    @property
    def prompts(self) -> list[str]:
        return ["a thing"] * len(self.reference)

    def pictures(self, final: Any) -> Tensor:
        return torch.from_numpy(final).float().reshape(-1, 3, 2, 2) + 0.5


def search_space(
    train: Any,
    validation: Any,
    space: Any,
    *,
    test: Any = None,
    metric: Any = None,
    seeds: Any = (),
    storage: Any = None,
    told: Any = None,
    on_trial: Any = None,
    **settings: Any,
) -> Any:
    """Return what the stage "decisions" alone finds, as `search` runs it on a pipeline's problems."""
    from functools import partial

    from diffplug.samplers.search.decisions.study import check_study, open_study
    from diffplug.samplers.search.leader import Callbacks, Problems
    from diffplug.samplers.search.metric import LatentError
    from diffplug.samplers.search.settings import Settings
    from diffplug.samplers.search.stages import run_stages

    name, metric = f"{space.evaluations} evaluations", metric or LatentError()
    known = {"evaluations": space.evaluations, "metric": metric.name, "pairs": len(train.prompts)}
    place = (storage, name, {**known, **(told or {})})
    check_study(*place)
    seed = {"seed": settings.pop("seed", 0)}
    return run_stages(
        Problems(train, validation, test), space.evaluations, space.nodes, stages=("decisions",),
        metric=metric, start=seeds, settings=Settings.of(**{"trials": 400, **seed, **settings}), space=space,
        study=partial(open_study, *place),
        callbacks=Callbacks() if on_trial is None else Callbacks(on_trial=on_trial),
    )  # fmt: skip
