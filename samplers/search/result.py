"""What a search gives, and the file in which it keeps what is done until it is finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diffplug.files import output_folder, read_json, write_json
from diffplug.samplers.schedule.schedule import SolverSchedule

__all__ = ["FileRecord", "Record", "SearchResult", "StageResult", "StudyRecord"]

FORMAT, VERSION = "solver-search", 2
Figures = dict[str, float]


@dataclass(frozen=True)
class StageResult:
    """What a stage reached: its best schedule, figures on both sets of pairs, and what it cost.

    evaluations: of the network, each over all pairs of a set, both sets counted; seconds: wall clock.
    amplification: of the schedule's table, see `stability`. accepted: better than what was there, on
    validation pairs. history: (spent, best value) on the way, where the stage tells them.
    """

    name: str
    schedule: SolverSchedule
    searched: Figures
    validation: Figures
    evaluations: int
    seconds: float
    amplification: float | None
    accepted: bool
    history: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON has it."""
        return {**vars(self), "schedule": self.schedule.to_json(), "history": [list(p) for p in self.history]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StageResult:
        """Return the result that `to_json` wrote; KeyError, TypeError or ValueError for anything else."""
        schedule = SolverSchedule.from_json(document["schedule"])
        history = tuple((float(a), float(b)) for a, b in document["history"])
        return cls(**{**document, "schedule": schedule, "history": history})


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    schedule: the winner, ready for `Solver(...)`. metric: what was minimised; figures have it as "value",
    beside the errors of the latents. validation, test: the winner's figures on pairs that chose it, and on
    pairs that nothing was chosen by (None where there are none). presets: figures on the validation pairs, by
    name; `baseline` is the best of them, baseline_test its figures on the test pairs. stages: what each came
    to. spent: schedules run on all searched pairs, where a budget counts them. finalists: (value on the
    searched pairs, value on the validation pairs) of the best decisions, study: Optuna's record of them.
    progress: the file that an interrupted search is resumed from, of no use once this is saved.
    """

    schedule: SolverSchedule
    metric: str
    baseline: str
    presets: Mapping[str, Figures]
    validation: Figures
    stages: tuple[StageResult, ...] = ()
    test: Figures | None = None
    baseline_test: Figures | None = None
    spent: float = 0.0
    finalists: tuple[tuple[float, float], ...] = ()
    study: Any = field(default=None, repr=False)
    progress: Path | None = None

    @property
    def improved(self) -> bool:
        """Whether any stage beat the baseline on the validation pairs."""
        return any(stage.accepted for stage in self.stages)

    @property
    def history(self) -> tuple[tuple[float, float], ...]:
        """(spent, best value) after every schedule, or every look of the gradient."""
        return tuple(point for stage in self.stages for point in stage.history)

    @property
    def gap(self) -> float:
        """The winner's value on the validation pairs less the best finalist's on those searched on."""
        return self.validation["value"] - min((value for value, _ in self.finalists), default=0.0)

    def forget(self) -> None:
        """Remove the file of progress, once the result is in a safe place."""
        if self.progress is not None:
            self.progress.unlink(missing_ok=True)


class Record(Protocol):
    """What a search has done so far, by key; values are JSON."""

    def read(self, key: str) -> Any:
        """Return what was written under a key, or None."""

    def write(self, key: str, value: Any) -> None:
        """Keep a value."""

    def damaged(self) -> str:
        """Return the beginning of a sentence about a record whose entries cannot be read."""


class FileRecord:
    """A record in a JSON file, or in memory alone (path None).

    metadata: what is searched. Raises ValueError for a file of another search, with the first difference, and
    for one that is no record; `anew` begins a new one in its place.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, metadata: Mapping[str, Any], *, anew: bool = False
    ):
        self.path = None if path is None else Path(path)
        self.metadata: dict[str, Any] = json.loads(json.dumps(metadata))
        self.known: dict[str, Any] = {}
        if self.path is not None and self.path.exists() and not anew:
            self.known = self._load(self.path)

    @classmethod
    def named(cls, folder: Path, metadata: Mapping[str, Any], *, anew: bool = False) -> FileRecord:
        """Return the record in a folder whose name says what is searched."""
        name = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:32]
        return cls(folder / f"search-{name}.json", metadata, anew=anew)

    def _load(self, path: Path) -> dict[str, Any]:
        document = read_json(path)
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            known, done = dict(document["search"]), dict(document["done"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_damaged(path)} ({error})") from error
        for key in [*self.metadata, *known]:
            if known.get(key) != self.metadata.get(key):
                raise ValueError(
                    f"the search in {str(path)!r} is one of {key} {known.get(key)!r}, this one has "
                    f"{self.metadata.get(key)!r}: take another file for it, or remove that one"
                )
        return done

    def read(self, key: str) -> Any:
        return self.known.get(key)

    def write(self, key: str, value: Any) -> None:
        self.known[key] = value
        if self.path is not None:
            output_folder(self.path.absolute().parent)
            document = {"format": FORMAT, "version": VERSION, "search": self.metadata, "done": self.known}
            write_json(self.path, document)

    def damaged(self) -> str:
        return "the record" if self.path is None else _damaged(self.path)


def _damaged(path: Path) -> str:
    return f"{str(path)!r} is no unfinished search: remove it, or do not resume"


@dataclass
class StudyRecord:
    """A record among the attributes of a study of Optuna."""

    study: Any

    def read(self, key: str) -> Any:
        return self.study.user_attrs.get(key)

    def write(self, key: str, value: Any) -> None:
        self.study.set_user_attr(key, value)

    def damaged(self) -> str:
        return f"the study {self.study.study_name!r} holds a stage that cannot be read: take another file"
