"""Peers of S3: other samplers of Optuna that propose schedules, each for `search_space(decisions=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks.lstm_ranks import LSTMRanks
from diffplug.samplers.search.decisions.evolution import S3Sampler, distributions
from diffplug.samplers.search.decisions.space import ScheduleSpace

__all__ = ["METHODS", "method"]

Values = Mapping[str, Any] | None


def method(name: str) -> Any:
    """Return what `Decisions(method=...)` takes for a name of `METHODS`, or the name itself for its own."""
    return METHODS.get(name, name)


def _lstm(space: ScheduleSpace, seed: int, best: Values = None) -> Any:
    return S3Sampler(space, seed=seed, predictor=LSTMRanks(space, seed=seed))


def _plain(make: Callable[[int], Any], space: ScheduleSpace, seed: int, best: Values = None) -> Any:
    return Seeded(make, seed)


def _cmaes(space: ScheduleSpace, seed: int, best: Values = None) -> Any:
    """Return CMA-ES on the real numbers, around the best values; the other decisions stay."""
    if best is None:
        raise ValueError("cmaes moves the numbers of a schedule that there is: give its values as best")
    fixed = {d.name: best[d.name] for d in space.dimensions if not d.real}
    start = {d.name: best[d.name] for d in space.dimensions if d.real}

    def make(seed: int) -> Any:
        chance = optuna.samplers.RandomSampler(seed)
        inner = optuna.samplers.CmaEsSampler(x0=start, sigma0=0.2, seed=seed, independent_sampler=chance)
        return Fixed(space, fixed, inner)

    return Seeded(make, seed)


METHODS: dict[str, Callable[..., Any]] = {
    "s3-lstm": _lstm,
    "tpe": partial(_plain, partial(optuna.samplers.TPESampler, multivariate=True, n_startup_trials=20)),
    "nsga2": partial(_plain, partial(optuna.samplers.NSGAIISampler, population_size=40)),
    "cmaes": _cmaes,
    "random": partial(_plain, optuna.samplers.RandomSampler),
}
"""By name. "cmaes" moves the real numbers of the best preset and leaves its other decisions."""


class Seeded(optuna.samplers.BaseSampler):
    """A sampler whose choices depend on its seed and the trial's number alone.

    Optuna's own draw from one stream: a search that goes on would draw again what it has drawn before, and
    two processes of one seed the same.
    """

    def __init__(self, make: Callable[[int], Any], seed: int) -> None:
        self.make, self.seed = make, seed
        self.inner = make(seed=seed)

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        self.inner = self.make(
            seed=int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        )
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.inner.infer_relative_search_space(study, trial))

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return dict(self.inner.sample_relative(study, trial, search_space))

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)


class Fixed(optuna.samplers.PartialFixedSampler):
    """Proposes the real numbers of a space with a base sampler, from the first trial on."""

    def __init__(self, space: ScheduleSpace, fixed: Mapping[str, Any], base: Any) -> None:
        super().__init__(dict(fixed), base)
        self.space = space
        self.reals = {name: each for name, each in distributions(space).items() if hasattr(each, "low")}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.reals)
