"""From rows to pictures with ids, and from pictures to shards: a pure function of the manifest.

An id is a hash of all that acts on a picture, so it survives sorting, other columns and other formats. A
shard ends where the ids say so, not at every 256th row: an edit changes one shard, not all that follow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffplug.demos.batch.manifest import ManifestError, Row
from diffplug.recipe import Recipe
from diffplug.registry import sampler_steps

__all__ = ["Picture", "Plan", "Shard", "digest", "picture_id", "plan"]

FORMAT = 1
"""Of ids; a change of what an id is made of is a new number."""

_SETTINGS = ("sampler", "steps", "guidance", "negative_prompt", "eta", "width", "height", "call")
_STEERING = ("particles", "reward", "strength", "options")
_FLOATS = ("guidance", "eta", "strength")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that is asked for: its id, what it shows, its seed, and where the manifest asks for it."""

    id: str
    prompt: str
    seed: int
    line: int
    group: int
    meta: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """Pictures that one process makes together, all by one recipe; `key` is a digest of their ids."""

    key: str
    recipe: Recipe
    pictures: tuple[Picture, ...]


@dataclass
class Plan:
    """All pictures of a manifest, in its order without doubles, and the shards they are made in.

    repeated: pictures that a line asks for and an earlier one did, with that line and its `meta`.
    """

    pictures: list[Picture]
    recipes: list[Recipe]
    shards: list[Shard]
    repeated: list[Picture] = field(default_factory=list)
    first_double: tuple[int, int] | None = None
    asked: int = field(default=0)

    @property
    def doubles(self) -> int:
        """How many pictures are asked for more than once."""
        return len(self.repeated)

    def line_of(self, recipe: Recipe) -> int:
        """Return the first line that asks for a recipe of this plan."""
        groups = {number for number, one in enumerate(self.recipes) if one == recipe}
        return next(picture.line for picture in self.pictures if picture.group in groups)


def plan(
    source: str | Path,
    rows: Iterable[tuple[int, Row]],
    *,
    model: str = "shapes",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    shard: int = 256,
) -> Plan:
    """Return what a manifest asks for.

    settings: for rows that say nothing, by the names of a row; those of steering act on rows that steer.
    model: name and version of the model as text; it is part of every id. seed: enters into the seeds of rows
    that name none, which follow from their content. shard: mean number of pictures of one. Raises
    ManifestError for a recipe that cannot be, with the line of its first row, and ValueError for settings of
    steering where no row steers.
    """
    groups = _Groups(model, settings or {})
    found = Plan([], groups.recipes, [])
    seen: dict[str, int] = {}
    problems: list[str] = []
    for line, row in rows:
        try:
            group, text = groups.of(row)
        except ValueError as error:
            problems.append(f"{source}:{line}: {error}")
            continue
        for picture in _pictures(row, line, group, text, seed):
            found.asked += 1
            if picture.id in seen:
                found.repeated.append(picture)
                found.first_double = found.first_double or (line, seen[picture.id])
                continue
            seen[picture.id] = line
            found.pictures.append(picture)
    if problems:
        raise ManifestError(problems[:20], max(0, len(problems) - 20))
    idle = [name for name in _STEERING if name in groups.settings]
    if settings and idle and not any(recipe.steer for recipe in groups.recipes):
        raise ValueError(
            f"--{idle[0]} {settings[idle[0]]} acts only with a steerer, and no row has one: add --steer fk, "
            "or leave it out"
        )
    found.shards = list(_shards(found.pictures, groups.recipes, shard))
    return found


def picture_id(group: str, prompt: str, seed: int) -> str:
    """Return 20 hex digits of a picture; `group` is the canonical text of its model and settings."""
    return hashlib.sha256(f"{group}\n{canonical([prompt, seed])}".encode()).hexdigest()[:20]


def canonical(value: Any) -> str:
    """Return JSON in which equal values are equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(ids: Sequence[str]) -> str:
    """Return the name of a shard of these pictures."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


class _Groups:
    """Rows of equal settings, each group with one recipe that was checked once."""

    def __init__(self, model: str, settings: Mapping[str, Any]) -> None:
        self.model, self.settings = model, {k: v for k, v in settings.items() if v is not None}
        self.recipes: list[Recipe] = []
        self._texts: list[str] = []
        self._known: dict[str, int | str] = {}

    def of(self, row: Row) -> tuple[int, str]:
        """Return the number and the canonical text of a row's group; ValueError for an impossible recipe."""
        values = self._values(row)
        key = canonical(values)
        if key not in self._known:
            try:
                self._known[key] = self._new(values)
            except (ValueError, OSError) as error:  # a sampler's file that cannot be read, too
                self._known[key] = str(error)
        group = self._known[key]
        if isinstance(group, str):
            raise ValueError(group)
        return group, self._texts[group]

    def _new(self, values: Mapping[str, Any]) -> int:
        from diffplug.making import fingerprints

        recipe = Recipe(**values)
        text = {"v": FORMAT, "model": self.model, **recipe.settings(), "files": fingerprints(recipe)}
        self.recipes.append(recipe)
        self._texts.append(canonical(text))
        return len(self.recipes) - 1

    def _values(self, row: Row) -> dict[str, Any]:
        """Return the settings of a row, its own first; -0.0 and whole floats are one number each."""
        own = {name: value for name in _SETTINGS if (value := getattr(row, name)) is not None}
        steering = {name: value for name in _STEERING if (value := getattr(row, name)) not in (None, {})}
        steer = row.steer if row.steer is not None else self.settings.get("steer")
        if steering and not steer:
            name, value = next(iter(steering.items()))
            raise ValueError(f"{name} {value} acts only with a steerer: add steer='fk', or leave it out")
        given = {name: self.settings[name] for name in _SETTINGS if name in self.settings}
        if row.sampler is not None and _says_steps(row.sampler):
            given.pop("steps", None)  # the row says them by its sampler
        values = {**given, **own, **steering}
        if steer:
            values = {**{n: self.settings[n] for n in _STEERING if n in self.settings}, **values}
            values["steer"] = steer
        return {n: float(v) + 0.0 if n in _FLOATS and v is not None else v for n, v in values.items()}


def _says_steps(name: str) -> bool:
    """Return whether a sampler's name says its steps; what it cannot be is told by the recipe."""
    with suppress(ValueError, OSError):
        return sampler_steps(name) is not None
    return False


def _pictures(row: Row, line: int, group: int, text: str, seed: int) -> Iterator[Picture]:
    first = row.seed if row.seed is not None else _seed_of(text, row.prompt, seed)
    for number in range(row.images):
        name = picture_id(text, row.prompt, first + number)
        yield Picture(name, row.prompt, first + number, line, group, row.meta)


def _seed_of(group: str, prompt: str, seed: int) -> int:
    """Return a seed below 2^53 from what a row asks for; never from its place."""
    text = f"{group}\n{canonical([prompt, seed])}\nseed"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 12


def _shards(pictures: Sequence[Picture], recipes: Sequence[Recipe], size: int) -> Iterator[Shard]:
    """Yield the shards, group by group: of size / 4 to 4 size pictures, cut where an id says so."""
    groups: dict[int, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    least, most, rate = max(1, size // 4), 4 * size, max(1, 3 * size // 4)
    for group, members in groups.items():
        start = 0
        for end, picture in enumerate(members, 1):
            long = end - start
            if long >= most or (long >= least and int(picture.id[:8], 16) % rate == 0) or end == len(members):
                part = tuple(members[start:end])
                yield Shard(digest([one.id for one in part]), recipes[group], part)
                start = end
