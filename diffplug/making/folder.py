"""Pictures into a folder: each is a file as soon as its batch is done, and what is there is not made again.

A `Row` says which picture is wanted. `make` is idempotent: killed at any moment and called again, or called
by several processes at once, it leaves one whole file for every row, with the bytes of a run that nobody
stopped (on one machine, with the same rows and batch size).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffplug
from diffplug.making.png import same_picture, save_new_picture
from diffplug.recipe import Recipe
from diffplug.recipe.batches import Batch, batches
from diffplug.registry import sampler_file

__all__ = ["Finished", "Folder", "Row", "make", "save_batch", "unmade"]

_NAME = re.compile(r"(seed-\d{6,}(?:-particle-\d+)?)(?:-(\d+))?\.png")


@dataclass(frozen=True)
class Row:
    """One picture to make, or all particles of one where the recipe's steerer returns them all."""

    recipe: Recipe
    prompt: str
    seed: int
    setup: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[int | None]:
        """Return the particles that are handed back, or [None] for a single picture."""
        everything = self.recipe.steer is not None and self.recipe.options.get("returns") == "all"
        return list(range(self.recipe.particles)) if everything else [None]

    def stem(self, piece: int | None) -> str:
        """Return the name of the file, without a number and suffix."""
        return f"seed-{self.seed:06d}" + ("" if piece is None else f"-particle-{piece:02d}")

    def settings(self, piece: int | None) -> dict[str, Any]:
        """Return what the file is asked for: two files of equal settings are the same picture."""
        asked = {"prompt": self.prompt, "seed": self.seed, **self.setup, **self.recipe.settings()}
        files = fingerprints(self.recipe)
        return asked | ({"files": files} if files else {}) | ({} if piece is None else {"particle": piece})


@dataclass(frozen=True)
class Finished:
    """A picture that is on the disk: its row (by place), file, reward reached, and whether it was made now.

    evaluations: of the network for its row. report: of the steerer, for the whole batch.
    """

    place: int
    row: Row
    path: Path
    reward: float | None
    fresh: bool
    evaluations: float
    report: Any = None


class Folder:
    """The pictures of a folder by their names, read once; `find` knows those that were asked for alike."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        found: dict[str, list[tuple[int, str]]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    found.setdefault(match[1], []).append((int(match[2] or 1), entry.name))
        return {stem: [name for _, name in sorted(names)] for stem, names in found.items()}

    def find(self, row: Row) -> list[Path] | None:
        """Return the files of a row; None where one is missing."""
        paths = [self._file(row, piece) for piece in row.pieces]
        return None if None in paths else [path for path in paths if path is not None]

    def _file(self, row: Row, piece: int | None) -> Path | None:
        settings = row.settings(piece)
        names = self._names.get(row.stem(piece), ())
        return next((self.path / name for name in names if same_picture(self.path / name, settings)), None)


def unmade(rows: Sequence[Row], folder: Path) -> list[int]:
    """Return the places of the rows that have no picture in the folder."""
    found = Folder(folder)
    return [place for place, row in enumerate(rows) if found.find(row) is None]


def make(
    pipe: Any,
    rows: Sequence[Row],
    folder: Path,
    *,
    max_rows: int = 16,
    again: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Finished]:
    """Yield every picture that was missing in the folder, each as soon as its file is whole.

    max_rows: pictures times particles in a call, halved when memory runs out. again: make all rows, beside
    what is there. on_step: told (done, of) after every step. A batch is made whole if one of its pictures is
    missing, for the last bit of a picture depends on its neighbours. Raises WriteError where the disk
    refuses: then what was yielded is there.
    """
    missing = set(range(len(rows)) if again else unmade(rows, folder))
    for first, group in _groups(rows):
        if missing.isdisjoint(range(first, first + len(group))):
            continue

        def wanted(part: slice, first: int = first) -> bool:
            return not missing.isdisjoint(range(first + part.start, first + part.stop))

        places = {place - first for place in missing}

        prompts, seeds = [row.prompt for row in group], [row.seed for row in group]
        recipe = group[0].recipe
        for batch in batches(recipe, pipe, prompts, seeds, max_rows=max_rows, wanted=wanted, on_step=on_step):
            for one in save_batch(batch, group, folder, again=again, wanted=places.__contains__):
                yield replace(one, place=first + one.place)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Yield neighbours with the same recipe, with the place of the first."""
    place = 0
    for _, group in itertools.groupby(rows, key=lambda row: row.recipe):
        found = list(group)
        yield place, found
        place += len(found)


def save_batch(
    batch: Batch,
    rows: Sequence[Row],
    folder: Path,
    *,
    again: bool = False,
    wanted: Callable[[int], bool] = lambda place: True,
) -> Iterator[Finished]:
    """Yield the pictures of a batch, each when its file is whole. rows: all those that batches are of."""
    recorded = {"versions": versions()}
    for index in range(batch.prompts):
        place = batch.first + index
        row = rows[place]
        for number, piece in enumerate(row.pieces if wanted(place) else ()):
            slot = index * batch.each + number
            image, reward = batch.images[slot], batch.rewards[slot]
            reached = {} if reward is None else {"rewards": {row.recipe.reward: reward}}
            settings = {**row.settings(piece), "used": {**batch.used, **recorded}, **reached}
            path, fresh = save_new_picture(image, folder, row.stem(piece), settings, again=again)
            yield Finished(place, row, path, reward, fresh, batch.evaluations, batch.report)


def versions() -> dict[str, str]:
    """Return the versions of what made a picture."""
    import diffusers
    import torch

    return {"diffplug": diffplug.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Return a hash of every small file that the recipe names: its sampler, its reward's code."""
    words = [recipe.sampler or ""]
    if recipe.steer is not None:
        words += re.findall(r"[^\s'\"+*();]+\.py", recipe.reward)
    named = {word: word for word in words if word.endswith((".json", ".npy", ".py"))}
    if recipe.sampler is not None and (file := sampler_file(recipe.sampler)) is not None:
        named[recipe.sampler] = file
    return {word: _hash(file) for word, file in named.items() if os.path.isfile(file)}


def _hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
