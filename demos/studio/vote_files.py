"""Votes as files: read, counted, and written as tables that trainers take, pictures included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffplug.files import ReadError, atomic_path, atomic_write, output_folder, read_bytes, safe_join

__all__ = ["FORMATS", "export_votes", "read_votes", "tally"]


_LARGEST = 2**30
"""Bytes that a file of votes may have: a few millions of them."""


def read_votes(path: Path) -> list[dict[str, Any]]:
    """Return the votes of a file, or of a folder's votes.jsonl.

    Raises ReadError for a file that cannot be read, and ValueError with file and line for what is no vote.
    """
    path = path / "votes.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ReadError(path, "there is no such file; the Vote tab of `diffplug demo -o FOLDER` writes one")
    try:
        lines = read_bytes(path, limit=_LARGEST).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ReadError(path, "it is no UTF-8 text") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_checked(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: this is no vote: {error!r}") from None
    return found


def _checked(row: Any) -> dict[str, Any]:
    """Return a vote; raise an error of some kind for what is none."""
    labels = [float(row[f"label_{i}"]) for i in (0, 1)]
    if not all(0 <= label <= 1 for label in labels):
        raise ValueError(f"labels are from 0 to 1, got {labels}")
    if not all(isinstance(row[name], str) for name in ("image_0", "image_1", "prompt")):
        raise ValueError("image_0, image_1 and prompt are texts")
    return {**row, "label_0": labels[0], "label_1": labels[1]}


def tally(votes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each way to make pictures how often it won, lost and tied, the best first."""
    counts: dict[str, list[int]] = {}
    for row in votes:
        for number in (0, 1):
            mine, other = row[f"label_{number}"], row[f"label_{1 - number}"]
            place = 0 if mine > other else 1 if mine < other else 2
            counts.setdefault(_name(row.get(f"recipe_{number}")), [0, 0, 0])[place] += 1
    rows = [
        dict(zip(("recipe", "won", "lost", "tied"), (name, *n), strict=True)) for name, n in counts.items()
    ]
    return sorted(rows, key=lambda row: (row["lost"] - row["won"], row["recipe"]))


def _name(recipe: Any) -> str:
    """Return a recipe's settings in a line."""
    if not isinstance(recipe, Mapping):
        return "unknown"
    return ", ".join(f"{name} {value}" for name, value in recipe.items() if value not in ("", {}, None))


def export_votes(source: Path, target: Path) -> int:
    """Write votes as a table, by the target's suffix, whole or not at all; return how many.

    .parquet: the columns of Pick-a-Pic, caption, jpg_0, jpg_1 (files of pictures as bytes), label_0, label_1,
    has_label; needs pyarrow. .jsonl: prompt, image_0, image_1, label_0, label_1 a line, and the pictures in a
    folder beside. Both are what `diffplug train pso-offline` reads. Raises ValueError for another suffix,
    where there is no vote, and where a picture is missing.
    """
    write = FORMATS.get(target.suffix.lower())
    if write is None:
        raise ValueError(f"{str(target)!r}: votes are written as {' or '.join(FORMATS)}")
    votes = read_votes(source)
    if not votes:
        raise ValueError(f"{str(source)!r} holds no vote yet: vote on the page of `diffplug demo`")
    folder = source if source.is_dir() else source.parent
    write([(row, [_picture(folder, row, i) for i in (0, 1)]) for row in votes], target)
    return len(votes)


def _picture(folder: Path, row: Mapping[str, Any], number: int) -> Path:
    path = safe_join(folder, row[f"image_{number}"])
    if not path.is_file():
        raise ValueError(
            f"there is no picture {row[f'image_{number}']!r} beside the votes in {str(folder)!r}"
        )
    return path


def _parquet(rows: Sequence[tuple[Mapping[str, Any], Sequence[Path]]], target: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError('parquet needs pyarrow: pip install "diffplug[batch]", or write .jsonl') from None
    columns = {
        "caption": [row["prompt"] for row, _ in rows],
        **{f"jpg_{i}": [pictures[i].read_bytes() for _, pictures in rows] for i in (0, 1)},
        **{f"label_{i}": [float(row[f"label_{i}"]) for row, _ in rows] for i in (0, 1)},
        "has_label": [True] * len(rows),
    }
    with atomic_path(target) as path:
        parquet.write_table(pyarrow.table(columns), path)


def _jsonl(rows: Sequence[tuple[Mapping[str, Any], Sequence[Path]]], target: Path) -> None:
    """Write pictures first, then the lines that name them."""
    home = output_folder(target.parent / f"{target.stem}-pictures")
    lines = []
    for row, pictures in rows:
        for picture in pictures:
            if not (home / picture.name).is_file():
                with atomic_path(home / picture.name) as path:
                    shutil.copyfile(picture, path)
        names = {f"image_{i}": f"{home.name}/{pictures[i].name}" for i in (0, 1)}
        labels = {f"label_{i}": float(row[f"label_{i}"]) for i in (0, 1)}
        lines.append(json.dumps({"prompt": row["prompt"], **names, **labels}, ensure_ascii=False) + "\n")
    atomic_write(target, "".join(lines))


FORMATS: dict[str, Callable[[Any, Path], None]] = {".parquet": _parquet, ".jsonl": _jsonl}
"""What votes are written as, by suffix."""
