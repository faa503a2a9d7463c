"""Rows by name: the package's, those of other packages, and the one that fits a pipeline."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from diffplug.files import read_json
from diffplug.loading import shapes_folder
from diffplug.samplers.few_step.catalogue import ANY, Row
from diffplug.samplers.few_step.sd_next import is_sd_next, sd_next_rows

GROUP = "diffplug.few_step"
_AT_STEPS = re.compile(r"(.+?)(?:@|-)(\d+)(?:-?steps?)?")


def shipped_folder() -> Path:
    """Return the folder of the rows that come with the package."""
    return Path(__file__).parent / "rows"


@functools.lru_cache(maxsize=1)
def shipped_rows() -> tuple[Row, ...]:
    """Return the rows that come with the package, in the order of preference; Shapes' students last."""
    files = (*sorted(shipped_folder().glob("*.json")), *sorted(students_folder().glob("*.json")))
    return tuple(row for file in files for row in rows_in(file))


def students_folder() -> Path:
    """Return the folder of the students of the embedded Shapes model, weights and rows."""
    return shapes_folder().parent / "few_step"


def all_rows(extra: Any = None) -> tuple[Row, ...]:
    """Return every row: `extra` ones first, then the package's, then those of entry points.

    extra: a `Row`, the path of a file of rows, or a list of those; they take the place of others of their
    name. Entry points of the group "diffplug.few_step" give the same, and cannot. Raises ValueError where
    two rows of one source have one name.
    """
    found: dict[str, Row] = {}
    for source in (_rows(extra), shipped_rows(), _entry_rows()):
        names_here = [row.name for row in source]
        for name in names_here:
            if names_here.count(name) > 1:
                raise ValueError(f"two few-step recipes are called {name!r}: rename one of them")
        for row in source:
            found.setdefault(row.name, row)
    return tuple(found.values())


def rows_in(path: str | os.PathLike[str]) -> tuple[Row, ...]:
    """Return the rows in a JSON file: one row, or {"groups": [{"common": {...}, "rows": [...]}, ...]}.

    What is in "common" holds for all rows of its group. A list of SD.Next's distilled models is read as well
    (see `sd_next.py`). Raises ValueError with the file and the row.
    """
    file = Path(path)
    document = read_json(file)
    if not isinstance(document, Mapping):
        raise ValueError(f"{os.fspath(file)!r} holds {type(document).__name__}, expected a JSON object")
    if is_sd_next(document):
        return sd_next_rows(document)
    groups = document.get("groups", [{"rows": [document]}])
    found = []
    for group in groups:
        common = group.get("common", {})
        found += [Row.from_json({**common, **each}, folder=str(file.parent)) for each in group["rows"]]
    return tuple(found)


def _rows(extra: Any) -> tuple[Row, ...]:
    if extra is None:
        return ()
    if isinstance(extra, Row):
        return (extra,)
    if isinstance(extra, (str, os.PathLike)):
        return rows_in(extra)
    if isinstance(extra, Mapping):
        return (Row.from_json(extra),)
    if isinstance(extra, Iterable):
        return tuple(row for each in extra for row in _rows(each))
    raise ValueError(
        f"{extra!r} is no few-step recipe: give a Row, the path of a JSON file, or a list of those"
    )


def _entry_rows() -> tuple[Row, ...]:
    return tuple(row for entry in sorted(entry_points(group=GROUP)) for row in _rows(entry.load()))


def names(rows: Sequence[Row] | None = None) -> list[str]:
    """Return every name and alias."""
    known = all_rows() if rows is None else rows
    return sorted({name for row in known for name in (row.name, *row.aliases)})


def split(text: str, rows: Sequence[Row] | None = None) -> tuple[str, int | None]:
    """Return name and steps of "hyper-sd@4", "lightning-4", "hyper-sd": steps None where none are said.

    A name that is a row's or an alias as it stands is taken as it stands. Raises ValueError with the nearest
    names for an unknown one.
    """
    known = names(rows)
    plain = text.strip().lower()
    if plain in known:
        return plain, None
    match = _AT_STEPS.fullmatch(plain)
    if match is not None and match[1] in known:
        return match[1], int(match[2])
    raise _unknown(text, known)


def _unknown(text: str, known: list[str]) -> ValueError:
    """Return an error that names the nearest of many names."""
    near = get_close_matches(text.strip().lower(), known, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(
        f"unknown few-step recipe {text!r}.{meant} `diffplug names --few-step` lists the {len(known)} names."
    )


def knows(text: str) -> bool:
    """Whether a text names a few-step recipe, with or without its steps."""
    try:
        split(text)
    except ValueError:
        return False
    return True


def row_for(name: str, family: str, steps: int | None, rows: Sequence[Row]) -> Row:
    """Return the row of this name that fits a family and a number of steps, the first where several do.

    Raises ValueError with the families that the name has, with the steps and the nearest row where the number
    is none of them, and with the sentence of a row that must not be touched.
    """
    called = [row for row in rows if row.name == name or name in row.aliases]
    if not called:
        raise _unknown(name, names(rows))
    refused = next((row for row in called if row.refused), None)
    if refused is not None:
        raise ValueError(f"{refused.name}: {refused.refused}")
    fitting = [row for row in called if row.family in (family, ANY)]
    if not fitting:
        families = ", ".join(sorted({row.family for row in called}))
        raise ValueError(f"{name} is for {families}; this pipeline is {family}: {_others(family, rows)}")
    if steps is None:
        return fitting[0]
    found = next((row for row in fitting if steps in row.steps), None)
    if found is None:
        raise ValueError(_no_such_steps(name, family, steps, fitting))
    return found


def _others(family: str, rows: Sequence[Row]) -> str:
    found = sorted(
        {(row.aliases or (row.name,))[0] for row in rows if row.family == family and not row.refused}
    )
    return f"for {family} there are {', '.join(found)}" if found else f"there is none for {family}"


def _no_such_steps(name: str, family: str, steps: int, rows: Sequence[Row]) -> str:
    offered = sorted({n for row in rows for n in row.steps})
    near = min(offered, key=lambda n: (abs(n - steps), n))
    row = next(row for row in rows if near in row.steps)
    numbers = ", ".join(map(str, offered))
    return (
        f"{name} for {family} has no {steps} steps, only {numbers}: the nearest is {row.name} with {near} "
        f"(FewStep({name!r}, steps={near}))"
    )
