"""What is finished in a folder: shards by name, and which pictures they hold. Nothing here renders.

Folders: `shard-<key>/` with `<id>.png` and `rows.jsonl`. Tar: `shard-<key>.tar` with `<id>.png`, `.json` and
`.txt` of each picture, and its row list in `.index/`, which is made anew from the tar where it is missing.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffplug.files import atomic_write, sync, sync_folder

__all__ = ["ROWS", "TAKEN", "FolderStore", "TarStore", "records_text", "store"]

ROWS = "rows.jsonl"
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
"""How a rename to a folder fails that is there already."""


def store(folder: Path, layout: str) -> FolderStore | TarStore:
    """Return the finished shards of a folder. layout: "folder", "tar" or "geneval"."""
    return TarStore(folder) if layout == "tar" else FolderStore(folder)


def records_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON lines."""
    return "".join(
        json.dumps(one, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n" for one in records
    )


class FolderStore:
    """Finished shards as folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, str] = {}
        self._seen: set[str] = set()

    def refresh(self) -> None:
        """Learn of shards that were finished since; what was read once is not read again."""
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries if self._is_shard(entry))
        for name in names:
            if name not in self._seen:
                self._seen.add(name)
                for record in self.records(name):
                    self.done.setdefault(record["id"], name)

    def names(self) -> list[str]:
        """Return the names of the finished shards that were read."""
        return sorted(self._seen)

    def _is_shard(self, entry: os.DirEntry[str]) -> bool:
        return entry.name.startswith("shard-") and entry.is_dir(follow_symlinks=False)

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield what is known of the pictures of a shard, `file` relative to the folder; those that exist."""
        home = self.folder / name
        there = set(os.listdir(home))
        with suppress(FileNotFoundError):
            for record in read_records((home / ROWS).read_bytes()):
                if record.get("file") in there:
                    yield {**record, "file": f"{name}/{record['file']}"}

    def holds(self, key: str) -> bool:
        """Return whether a shard of that name is finished."""
        return (self.folder / f"shard-{key}").is_dir()

    def read_picture(self, record: Mapping[str, Any]) -> bytes:
        """Return the PNG file of a record."""
        return (self.folder / record["file"]).read_bytes()

    def commit(self, work: Path, key: str) -> bool:
        """Put a finished work folder in its place; False where another process was first."""
        try:
            os.rename(work, self.folder / f"shard-{key}")
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            shutil.rmtree(work, ignore_errors=True)
            return False
        sync_folder(self.folder)
        return True


class TarStore(FolderStore):
    """Finished shards as tar files, in the way that webdataset reads them."""

    def _is_shard(self, entry: os.DirEntry[str]) -> bool:
        return entry.name.startswith("shard-") and entry.name.endswith(".tar")

    def _index(self, name: str) -> Path:
        return self.folder / ".index" / f"{name.removesuffix('.tar')}.jsonl"

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        index = self._index(name)
        if index.is_file():
            found: Iterable[dict[str, Any]] = read_records(index.read_bytes())
        else:
            found = self._read(name)
        for record in found:
            yield {**record, "file": f"{name}/{record['file']}"}

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        with tarfile.open(self.folder / name) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    yield json.loads(file.read())

    def holds(self, key: str) -> bool:
        return (self.folder / f"shard-{key}.tar").is_file()

    def read_picture(self, record: Mapping[str, Any]) -> bytes:
        name, _, member = str(record["file"]).partition("/")
        with tarfile.open(self.folder / name) as archive:
            file = archive.extractfile(member)
            if file is None:
                raise ValueError(f"{member!r} in {name!r} is no file")
            return file.read()

    def commit(self, work: Path, key: str) -> bool:
        text = (work / ROWS).read_bytes()
        part = work / "shard.tar.part"
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
            for record in read_records(text):
                _add(archive, work, record)
        sync(part)
        target = self.folder / f"shard-{key}.tar"
        first = not target.exists()
        index = self._index(target.name)
        index.parent.mkdir(exist_ok=True)
        atomic_write(index, text)
        os.replace(part, target)  # of two that were equally fast both have the same bytes
        sync_folder(self.folder)
        shutil.rmtree(work, ignore_errors=True)
        return first


def _add(archive: tarfile.TarFile, work: Path, record: Mapping[str, Any]) -> None:
    """Add a picture, what is known of it, and its prompt; nothing tells when or by whom it was made."""
    stem = str(record["file"]).removesuffix(".png")
    texts = {"json": json.dumps(record, ensure_ascii=False, sort_keys=True), "txt": str(record["prompt"])}
    members = {"png": (work / str(record["file"])).read_bytes(), **{k: v.encode() for k, v in texts.items()}}
    for suffix in sorted(members):
        info = tarfile.TarInfo(f"{stem}.{suffix}")
        info.size, info.mode, info.mtime = len(members[suffix]), 0o644, 0
        archive.addfile(info, io.BytesIO(members[suffix]))


def read_records(data: bytes) -> list[dict[str, Any]]:
    """Return the records of a row list; a damaged line counts as none."""
    found = []
    for line in data.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "id" in record]
