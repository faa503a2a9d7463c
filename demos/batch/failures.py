"""Rows that could not be made: recorded beside the pictures, tried again by the next run, and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffplug.demos.batch.job import Job
from diffplug.demos.batch.plan import Picture
from diffplug.demos.batch.store import read_records, records_text
from diffplug.files import atomic_write

__all__ = ["Failures", "TooManyFailures"]

_FIRST = 64
TRIES = 2


class TooManyFailures(Exception):
    """So many rows fail that it is not the rows; the message says what the last one said."""


class Failures:
    """The failures of a folder, in `failed/<key of the shard>.jsonl`, and of this process."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, job.folder / "failed"
        self.tried = self.failed = 0
        self._in_a_row = 0

    def add(self, picture: Picture, kind: str, message: str) -> dict[str, Any]:
        """Return the record of a failure; raise TooManyFailures where the set-up must be wrong."""
        self.tried += 1
        self.failed += 1
        self._in_a_row += 1
        early = self.tried <= _FIRST and self.failed > self.job.max_failures * _FIRST
        if early or self._in_a_row >= 3 * self.job.max_rows:
            raise TooManyFailures(
                f"{self.failed} of the first {self.tried} rows failed, so it is not the rows. "
                f"The last one: {kind}: {message}"
            )
        return {
            "id": picture.id,
            "line": picture.line,
            "prompt": picture.prompt,
            "seed": picture.seed,
            "error": kind,
            "message": message,
            "tries": TRIES,
            "run": self.job.run,
        }

    def went_well(self, rows: int) -> None:
        """Count rows that were made."""
        self.tried += rows
        self._in_a_row = 0

    def passed(self, key: str) -> set[str]:
        """Return the ids of a shard that this run has tried already, or any run where failures are kept."""
        return {
            record["id"]
            for record in self._of(self.folder / f"{key}.jsonl")
            if self.job.keep_failed or record.get("run") == self.job.run
        }

    def write(self, key: str, failures: Sequence[Mapping[str, Any]]) -> None:
        """Put the failures of a shard in the place of older ones."""
        path = self.folder / f"{key}.jsonl"
        if failures:
            self.folder.mkdir(exist_ok=True)
            atomic_write(path, records_text(failures))
        elif path.exists():
            path.unlink()

    def all(self) -> Iterator[dict[str, Any]]:
        """Yield every failure that is recorded in the folder."""
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else ():
            yield from self._of(path)

    def _of(self, path: Path) -> list[dict[str, Any]]:
        with suppress(OSError, json.JSONDecodeError):
            return read_records(path.read_bytes())
        return []
