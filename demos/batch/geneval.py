"""The layout that GenEval's evaluator walks: a folder `00017` a prompt, with its pictures in `samples`.

The folders are links to the pictures of the shards, laid out when a prompt is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffplug.demos.batch.lease import owner_is_dead
from diffplug.demos.batch.plan import Picture, Plan
from diffplug.demos.batch.store import TAKEN
from diffplug.files import atomic_write, host, sync_folder

__all__ = ["lay_out"]

_TRIES = 5


def lay_out(folder: Path, plan: Plan, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """Make the folders of all prompts that are complete; return how many there are, and how many are not.

    A line of the manifest is a prompt, also one whose pictures an earlier line asked for; its `meta` is the
    benchmark's own row and becomes `metadata.jsonl`.
    """
    lines: dict[int, list[Picture]] = {}
    for picture in (*plan.pictures, *plan.repeated):
        lines.setdefault(picture.line, []).append(picture)
    _sweep(folder / ".work")
    complete = 0
    for number, (_, pictures) in enumerate(sorted(lines.items())):
        pictures.sort(key=lambda picture: picture.seed)
        if all(picture.id in rows for picture in pictures):
            files = [folder / one["file"] for picture in pictures for one in rows[picture.id]]
            _prompt(folder, f"{number:05d}", pictures[0], files)
            complete += 1
    _remove_others(folder, len(lines))
    return {"complete": complete, "incomplete": len(lines) - complete}


def _prompt(folder: Path, name: str, picture: Picture, files: Sequence[Path]) -> None:
    target, row = folder / name, {"prompt": picture.prompt, **(picture.meta or {})}
    text = json.dumps(row, ensure_ascii=False)
    if _is(target, text, files):
        return
    made = Path(tempfile.mkdtemp(prefix=f"{name}.{host()}-{os.getpid()}-", dir=folder / ".work"))
    made.chmod(0o755)
    (made / "samples").mkdir()
    for number, file in enumerate(files):
        _link(file, made / "samples" / f"{number:04d}.png")
    atomic_write(made / "metadata.jsonl", text)
    _put(made, target, lambda: _is(target, text, files))
    sync_folder(folder)


def _put(made: Path, target: Path, same: Callable[[], bool]) -> None:
    """Put a folder in its place; one that is `same`, which another process was first to put there, stays."""
    for left in reversed(range(_TRIES)):
        try:
            os.rename(made, target)
            return
        except OSError as error:
            if error.errno not in TAKEN or not left:
                raise
        if same():
            shutil.rmtree(made, ignore_errors=True)
            return
        shutil.rmtree(target, ignore_errors=True)


def _is(target: Path, text: str, files: Sequence[Path]) -> bool:
    """Return whether a prompt's folder holds just these pictures and this row."""
    samples = target / "samples"
    try:
        return (
            len(os.listdir(samples)) == len(files)
            and all(
                (samples / f"{i:04d}.png").read_bytes() == file.read_bytes() for i, file in enumerate(files)
            )
            and (target / "metadata.jsonl").read_text("utf-8") == text
        )
    except OSError:  # nothing there, or another process takes it away just now
        return False


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sweep(work: Path) -> None:
    """Remove what dead processes left of prompts that were being laid out."""
    for path in work.iterdir():
        name, _, owner = path.name.partition(".")
        if name.isdecimal() and owner_is_dead(owner):
            shutil.rmtree(path, ignore_errors=True)


def _remove_others(folder: Path, count: int) -> None:
    """Remove the folders of prompts that the manifest no longer has."""
    for path in folder.iterdir():
        if path.name.isdecimal() and len(path.name) == 5 and int(path.name) >= count:
            shutil.rmtree(path, ignore_errors=True)
