"""The study of a search: where it is kept, what it is a study of, who proposes, what it has cost."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from diffplug.files import output_folder
from diffplug.registry import unknown
from diffplug.samplers.search.s3 import S3Sampler, distributions
from diffplug.samplers.search.space import ScheduleSpace

__all__ = [
    "METHODS",
    "asked",
    "check_study",
    "complete",
    "open_study",
    "quiet",
    "spent",
    "storage_of",
    "study_sampler",
]

METHODS = ("s3", "s3-lstm", "evolution", "tpe", "nsga2", "cmaes", "random")
"""Who proposes schedules. "evolution" is "s3" without its predictor; "cmaes" moves the real numbers of the
best preset and leaves its other decisions."""
TOLD = "search"  # the study's attribute that says what it is a study of
PATIENCE = 10
JOURNALS = (".log", ".journal", ".jsonl")


def storage_of(place: Any) -> Any:
    """Optuna's storage for a file (SQLite, or a journal if it ends so), a database's URL, or None."""
    if not isinstance(place, (str, Path)) or "://" in str(place):
        return place
    path = Path(place)
    output_folder(path.parent)
    if path.suffix in JOURNALS:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(str(path)))
    return f"sqlite:///{path}"


def open_study(place: Any, name: str, told: Mapping[str, Any], *, make: bool = True) -> Any:
    """The study of that name in a storage; made if it is not there, or None.

    told: what is searched, JSON. Raises ValueError for a study of something else, which names the first
    difference, and for a file that holds no studies.
    """
    try:
        storage = storage_of(place)
        if not make and name not in optuna.get_all_study_names(storage):
            return None
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    except ValueError:
        raise
    except Exception as error:  # whatever the database beneath finds wrong with the file
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{str(place)!r} cannot be opened as a study ({reason}): take another file"
        ) from error
    known = study.user_attrs.get(TOLD)
    if known is None and not study.trials:
        study.set_user_attr(TOLD, json.loads(json.dumps(told)))
    else:
        _check_same(place, known or {}, json.loads(json.dumps(told)))
    return study


def check_study(place: Any, name: str, told: Mapping[str, Any]) -> None:
    """Raise ValueError, as `open_study` would, for what is there already; nothing is made."""
    there = Path(place).exists() if isinstance(place, (str, Path)) and "://" not in str(place) else place
    if there:
        open_study(place, name, told, make=False)


def _check_same(place: Any, known: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    for key in [*told, *known]:
        if known.get(key) != told.get(key):
            raise ValueError(
                f"the study in {str(place)!r} is one of {key} {known.get(key)!r}, this search has "
                f"{told.get(key)!r}: take another file for it"
            )


def complete(study: Any) -> list[FrozenTrial]:
    """The trials that were run on all pairs, best first; of equal ones the earlier."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [each for each in trials if each.value is not None and np.isfinite(each.value)]
    return sorted(found, key=lambda each: (float(each.value), each.number))


def asked(study: Any) -> list[dict[str, Any]]:
    """The values of all trials that are done, wait, or are being run.

    One that failed or was interrupted is not among them, nor one whose process must have died: that has been
    run `PATIENCE` times as long as the longest that is done.
    """
    trials = study.get_trials(deepcopy=False)
    longest = max((t.duration for t in trials if t.duration is not None), default=timedelta(hours=1))
    oldest = datetime.now() - max(PATIENCE * longest, timedelta(minutes=1))
    found = [
        each
        for each in trials
        if each.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
        or (each.state == TrialState.RUNNING and each.datetime_start and each.datetime_start > oldest)
    ]
    return [each.system_attrs.get("fixed_params") or each.params for each in found]


def spent(study: Any) -> float:
    """What all workers have spent so far, in schedules run on all pairs."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return float(sum(each.user_attrs.get("cost", 1.0) for each in trials))


def study_sampler(method: str, space: ScheduleSpace, seed: int, best: Mapping[str, Any] | None = None) -> Any:
    """Optuna's sampler for a name out of `METHODS`; best: values to start from, which "cmaes" needs."""
    if method not in METHODS:
        raise unknown("search method", method, list(METHODS))
    if method == "cmaes" and best is None:
        raise ValueError("cmaes moves the numbers of a schedule that there is: give its values as best")
    if method == "s3-lstm":
        from diffplug.samplers.search.lstm import LSTMRanks

        return S3Sampler(space, seed=seed, predictor=LSTMRanks(space, seed=seed))
    if method in ("s3", "evolution"):
        return S3Sampler(space, seed=seed, children=300 if method == "s3" else 0)
    samplers = optuna.samplers
    make: dict[str, Callable[[int], Any]] = {
        "cmaes": lambda each: _cmaes(space, each, best or {}),
        "tpe": lambda each: samplers.TPESampler(seed=each, multivariate=True, n_startup_trials=20),
        "nsga2": lambda each: samplers.NSGAIISampler(seed=each, population_size=40),
        "random": samplers.RandomSampler,
    }
    return _Seeded(make[method], seed)


class _Seeded(optuna.samplers.BaseSampler):
    """A sampler whose choices depend on its seed and the trial's number alone.

    Optuna's own draw from one stream: a search that goes on would draw again what it has drawn before, and
    two processes of one seed the same.
    """

    def __init__(self, make: Callable[[int], Any], seed: int) -> None:
        self.make, self.seed = make, seed
        self.inner = make(seed)

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        self.inner = self.make(int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]))
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.inner.infer_relative_search_space(study, trial))

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return dict(self.inner.sample_relative(study, trial, search_space))

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)


def _cmaes(space: ScheduleSpace, seed: int, best: Mapping[str, Any]) -> Any:
    """CMA-ES on the real numbers, around the best values; the other decisions stay as they are there."""
    fixed = {d.name: best[d.name] for d in space.dimensions if not d.real}
    start = {d.name: best[d.name] for d in space.dimensions if d.real}
    inner = optuna.samplers.CmaEsSampler(
        x0=start, sigma0=0.2, seed=seed, independent_sampler=optuna.samplers.RandomSampler(seed)
    )
    return _Fixed(space, fixed, inner)


class _Fixed(optuna.samplers.PartialFixedSampler):
    """Proposes the real numbers of a space with a base sampler, from the first trial on."""

    def __init__(self, space: ScheduleSpace, fixed: Mapping[str, Any], base: Any) -> None:
        super().__init__(dict(fixed), base)
        self.space = space
        self.reals = {name: each for name, each in distributions(space).items() if hasattr(each, "low")}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.reals)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's log and its experimental warnings are off inside the block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)  # how CMA-ES is told where to start
            yield
    finally:
        optuna.logging.set_verbosity(level)
