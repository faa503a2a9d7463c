"""The folder in which a shard is being made: private to a process, adopted by the next when that one died."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffplug.demos.batch.lease import Lease, owner_is_dead
from diffplug.demos.batch.store import ROWS, FolderStore, read_records, records_text
from diffplug.files import atomic_write, sync_folder

__all__ = ["Work", "sweep"]


class Work:
    """Pictures and records of a shard before it is finished.

    A batch is there when its record is, `batch-<first>.json`, which is written after its pictures are on the
    disk; what a killed process left of a batch without a record is written again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, folder: Path, key: str, lease: Lease) -> Work:
        """Return the work of a shard: what a dead process left of it, or an empty folder."""
        mine = folder / f"{key}.{lease.name}"
        for name in sorted(os.listdir(folder)):
            if not name.startswith(f"{key}.") or name.endswith(".lease") or not (folder / name).is_dir():
                continue
            if owner_is_dead(name.partition(".")[2]) or _silent(folder / name, lease):
                if not mine.exists():
                    with suppress(OSError):  # another process was first
                        os.rename(folder / name, mine)
                else:
                    shutil.rmtree(folder / name, ignore_errors=True)
        mine.mkdir(exist_ok=True)
        return cls(mine)

    def batch(self, first: int, run: str) -> dict[str, Any] | None:
        """Return the record of the batch that begins at a place; None for one that is to be made.

        One with rows that failed in another run is made again.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / f"batch-{first:05d}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return None if found["failures"] and found["run"] != run else found

    def save(
        self,
        first: int,
        run: str,
        pictures: Mapping[str, bytes],
        records: Sequence[Mapping[str, Any]],
        failures: Sequence[Mapping[str, Any]],
    ) -> None:
        """Put pictures by file name on the disk, then the record of their batch."""
        for name, data in pictures.items():
            with open(self.path / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        text = json.dumps({"run": run, "records": list(records), "failures": list(failures)})
        atomic_write(self.path / f"batch-{first:05d}.json", text)

    @property
    def finished(self) -> list[dict[str, Any]] | None:
        """Return the records of all pictures where nothing is left to do but the commit."""
        path = self.path / ROWS
        return read_records(path.read_bytes()) if path.is_file() else None

    def gather(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the records of the pictures that were made, and of the rows that failed."""
        found = [json.loads(path.read_bytes()) for path in sorted(self.path.glob("batch-*.json"))]
        return [one for f in found for one in f["records"]], [one for f in found for one in f["failures"]]

    def finish(self, store: FolderStore, key: str, records: Sequence[Mapping[str, Any]]) -> bool:
        """Commit the shard; return whether this process was the first.

        The row list comes first: from then on it alone says what belongs to the shard.
        """
        if not records:
            shutil.rmtree(self.path, ignore_errors=True)
            return True
        if self.finished is None:
            atomic_write(self.path / ROWS, records_text(records))
        for name in set(os.listdir(self.path)) - {ROWS, *(str(record["file"]) for record in records)}:
            (self.path / name).unlink()
        sync_folder(self.path)
        return store.commit(self.path, key)

    def park(self) -> None:
        """Leave what is there to the next process; an empty folder goes."""
        with suppress(OSError):
            self.path.rmdir()


def sweep(folder: Path, finished: FolderStore) -> None:
    """Remove what dead processes left of shards that are finished."""
    for path in folder.iterdir():
        key, _, owner = path.name.partition(".")
        if path.is_dir() and owner_is_dead(owner) and finished.holds(key):
            shutil.rmtree(path, ignore_errors=True)


def _silent(path: Path, lease: Lease) -> bool:
    """Return whether nobody wrote into a folder of work for the life of a lease."""
    try:
        return lease.path.stat().st_mtime - path.stat().st_mtime >= max(lease.life, 1.0)
    except OSError:
        return False
