"""Which of two pictures people prefer: one line a vote, with the pictures beside, for trainers to read."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffplug.demos.studio.studio import Made, Studio
from diffplug.demos.studio.vote_files import export_votes, read_votes
from diffplug.files import output_folder
from diffplug.making.png import save_png

__all__ = ["VERDICTS", "Pair", "Votes", "export_votes", "read_votes"]

VERDICTS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5)}
"""Labels of the left and the right picture."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt. swapped: whether picture 1 is shown on the left."""

    pictures: tuple[Made, Made]
    names: tuple[str, str]
    swapped: bool
    shown: float = field(default_factory=time.monotonic)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def sides(self) -> tuple[Made, Made]:
        """Return the left and the right picture."""
        first, second = self.pictures
        return (second, first) if self.swapped else (first, second)

    def revealed(self) -> str:
        """Return which was which."""
        left, right = reversed(self.names) if self.swapped else self.names
        return f"left: {left}; right: {right}"


class Votes:
    """The votes of a folder: `votes.jsonl`, and the pictures by their ids."""

    def __init__(self, folder: Path, studio: Studio) -> None:
        self.folder, self.studio = output_folder(folder), studio
        self._lock = threading.Lock()
        self._counted: set[str] = set()

    @property
    def path(self) -> Path:
        """Return the file of the votes."""
        return self.folder / "votes.jsonl"

    def vote(self, pair: Pair, verdict: str, session: str) -> bool:
        """Append a vote as one line; False where this pair was voted on already.

        verdict: left, right, tie. Raises ValueError for another word.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"a verdict is left, right or tie, got {verdict[:80]!r}")
        left, right = VERDICTS[verdict]
        labels = (right, left) if pair.swapped else (left, right)
        row: dict[str, Any] = {"v": 1, "prompt": pair.pictures[0].form.prompt}
        for number, made in enumerate(pair.pictures):
            row[f"image_{number}"] = self._picture(made)
            row[f"label_{number}"] = labels[number]
            row[f"recipe_{number}"] = made.form.recipe().settings()
            row[f"seed_{number}"] = made.form.seed
        row["shown_left"] = int(pair.swapped)
        row |= {
            "seconds": round(time.monotonic() - pair.shown, 2),
            "session": session,
            "time": round(time.time()),
        }
        with self._lock:
            if pair.token in self._counted:
                return False
            self._counted.add(pair.token)
            _append(self.path, row)
        return True

    def _picture(self, made: Made) -> str:
        """Return the name of a picture's file, which is written where it is missing."""
        name = f"{self.studio.key(made.form)}.png"
        if not (self.folder / name).exists():
            save_png(made.images[0], self.folder / name, json.loads(made.images[0].info["diffplug"]))
        return name


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line with one write, so that lines of several processes do not mix."""
    data = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
