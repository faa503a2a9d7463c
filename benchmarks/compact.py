"""Results as JSON that people can read: histories of few points, lists of numbers in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from diffplug.files import atomic_write, read_json

__all__ = ["kept_results", "thinned", "written"]

WIDTH = 110


def thinned(history: Sequence[Sequence[float]], most: int = 40) -> list[list[float]]:
    """At most so many points of (spent, best value): the ends, and between them the largest improvements."""
    points = [[round(float(spent), 2), float(best)] for spent, best in history]
    if len(points) <= most:
        return points
    gains = np.array([before[1] - after[1] for before, after in pairwise(points[:-1])])
    chosen = 1 + np.argsort(-gains, kind="stable")[: most - 2]
    better = [int(i) for i in sorted(chosen) if gains[i - 1] > 0]
    return [points[i] for i in (0, *better, len(points) - 1)]


def written(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all, with every list or object in one line that fits there."""
    atomic_write(path, _text(json.loads(json.dumps(value, allow_nan=False))) + "\n")


def kept_results(path: Path) -> dict[str, Any]:
    """The results in a file, to go on with; none where it is not there."""
    return dict(read_json(path)["results"]) if path.exists() else {}


def _text(value: Any, indent: int = 0) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or len(line) + indent <= WIDTH:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_text(each, indent + 1)}" for key, each in value.items()]
    else:
        parts = [_text(each, indent + 1) for each in value]
    space = " " * (indent + 1)
    inside = ",\n".join(space + row for row in _rows(parts, WIDTH - indent))
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return f"{opened}\n{inside}\n{' ' * indent}{closed}"


def _rows(parts: Sequence[str], width: int) -> list[str]:
    """As many parts in a row as fit; one of several lines stands alone."""
    rows: list[str] = []
    for part in parts:
        joined = f"{rows[-1]}, {part}" if rows else part
        if rows and "\n" not in joined and len(joined) <= width:
            rows[-1] = joined
        else:
            rows.append(part)
    return rows
