"""Optuna study of a schedule search: storage, identity check, sampler, evaluations spent."""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from diffplug.files import output_folder
from diffplug.registry import unknown
from diffplug.samplers.search.decisions.evolution import S3Sampler
from diffplug.samplers.search.decisions.space import ScheduleSpace

__all__ = [
    "METHODS",
    "asked",
    "bury",
    "check_method",
    "check_study",
    "complete",
    "open_study",
    "quiet",
    "sign",
    "spent",
    "storage_of",
    "study_sampler",
]

METHODS = ("s3", "evolution")
"""Who proposes schedules; "evolution" is "s3" without its predictor."""
METADATA = "search"  # the study's attribute that says what it is a study of
WORKER = "worker"  # the attribute of a trial with its host, process and when that began
PATIENCE = 10
JOURNALS = (".log", ".journal", ".jsonl")
URL = re.compile(r"[a-z0-9+]+:/")  # a path has lost one of the two
ATTEMPTS = 8  # to open a database that another process is making


def storage_of(place: Any) -> Any:
    """Return Optuna's storage for a file (SQLite, or a journal if it ends so), a database's URL, or None.

    Raises ValueError for a link: what it points to may be somebody else's.
    """
    if not is_file(place):
        return str(place) if isinstance(place, Path) else place
    path = Path(place)
    if path.is_symlink():
        raise ValueError(
            f"{str(path)!r} is a link, and a study is not written through one: name the file itself"
        )
    output_folder(path.parent)
    if path.suffix in JOURNALS:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(str(path)))
    return f"sqlite:///{path}"


def is_file(place: Any) -> bool:
    """Whether a storage is named by its file, and not by a URL."""
    return isinstance(place, (str, Path)) and not URL.match(str(place))


def open_study(place: Any, name: str, metadata: Mapping[str, Any], *, make: bool = True) -> Any:
    """Return the study of that name in a storage; made if it is not there, or None.

    metadata: what is searched, JSON. Raises ValueError for a study of something else, which names the first
    difference, for one of several objectives or of what should grow, and for a file that holds no studies.
    """
    if isinstance(place, str) and URL.match(place) and "://" not in place:
        raise ValueError(f"{place!r} is neither a file nor the URL of a database, as in sqlite:///study.db")
    study = _opened(place, name, make=make)
    if study is None:
        return None
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError(
            f"the study in {str(place)!r} does not minimise one value, but has "
            f"{', '.join(d.name.lower() for d in study.directions)}: take another file"
        )
    known = study.user_attrs.get(METADATA)
    if known is None and not study.trials:
        study.set_user_attr(METADATA, json.loads(json.dumps(metadata)))
    else:
        _check_same(place, known or {}, json.loads(json.dumps(metadata)))
    return study


def _opened(place: Any, name: str, *, make: bool) -> Any:
    """Return the study as Optuna has it; two processes may be making its database at once."""
    storage = storage_of(place)
    for attempt in range(ATTEMPTS):
        try:
            if not make and name not in optuna.get_all_study_names(storage):
                return None
            return optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        except Exception as error:  # whatever the database beneath finds wrong with the file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if attempt + 1 < ATTEMPTS and any(
                sign in reason for sign in ("UNIQUE", "already exists", "locked")
            ):
                sleep(0.1 * 2**attempt)
                continue
            raise ValueError(
                f"{str(place)!r} cannot be opened as a study ({reason}): take another file"
            ) from error


def check_study(place: Any, name: str, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError, as `open_study` would, for what is there already; nothing is made."""
    there = Path(place).exists() if is_file(place) else place
    if there:
        open_study(place, name, metadata, make=False)


def _check_same(place: Any, known: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    for key in [*metadata, *known]:
        if known.get(key) != metadata.get(key):
            raise ValueError(
                f"the study in {str(place)!r} is one of {key} {known.get(key)!r}, this search has "
                f"{metadata.get(key)!r}: take another file for it"
            )


def complete(study: Any) -> list[FrozenTrial]:
    """Return the trials that were run on all pairs, best first; of equal ones the earlier."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [each for each in trials if each.value is not None and np.isfinite(each.value)]
    return sorted(found, key=lambda each: (float(each.value), each.number))


def asked(study: Any) -> list[dict[str, Any]]:
    """Return the values of all trials that are done, wait, or are being run.

    One that failed or was interrupted is not among them, nor one whose process must have died on another
    machine: that has been run `PATIENCE` times as long as the longest that is done.
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


def sign(trial: Any) -> None:
    """Write into a trial which process runs it."""
    trial.set_user_attr(WORKER, [platform.node(), os.getpid(), _started(os.getpid())])


def bury(study: Any) -> None:
    """Mark what a process of this machine was running when it died as failed, so that it is run again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, pid, began = trial.user_attrs.get(WORKER) or ("", 0, "")
        if host == platform.node() and _started(pid) != began:
            study.tell(trial.number, state=TrialState.FAIL)


def _started(pid: int) -> str:
    """Return when a process began, as the system counts; "" for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "" if Path("/proc/self").exists() or not _alive(pid) else "running"


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # asked in the same way, Windows would end it
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def spent(study: Any) -> float:
    """Return what all workers have spent so far, in schedules run on all pairs."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return float(sum(each.user_attrs.get("cost", 1.0) for each in trials))


def study_sampler(method: Any, space: ScheduleSpace, seed: int, best: Mapping[str, Any] | None = None) -> Any:
    """Return Optuna's sampler for a name out of `METHODS`, or what a function makes of the other arguments.

    best: values of the best schedule so far, for samplers that need a place to start from.
    """
    if callable(method):
        return method(space, seed, best)
    check_method(method)
    return S3Sampler(space, seed=seed, children=300 if method == "s3" else 0)


def check_method(method: Any) -> None:
    """Raise ValueError for an unknown name."""
    if not callable(method) and method not in METHODS:
        raise unknown("search method", method, list(METHODS))


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's log and its experimental warnings are off inside the block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
