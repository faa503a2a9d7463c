"""Nests of tensors (dict, list, tuple, dataclass, at any depth) whose rows are particles; how they move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.steering.crowd.ragged import Ragged
from diffplug.steering.engine.history import Rows

_SAME_FOR_ALL = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Nest:
    """Moves the rows of nested state, and refuses what it cannot move.

    rows: the first size of every tensor. shared: paths of parts that are the same for all rows and stay, such
    as "state.table" or "out.1"; what lies below a path is shared too. Plain numbers and texts stay as well.
    """

    def __init__(self, rows: int, shared: tuple[str, ...] = ()) -> None:
        self.rows, self.shared = rows, shared
        self.met: set[str] = set()

    def idle(self) -> list[str]:
        """Return the shared paths that nothing has had so far, but for those below another one."""
        below = {p for p in self.shared for q in self.shared if p.startswith(f"{q}.")}
        return [path for path in self.shared if path not in self.met | below]

    def check(self, value: Any, path: str) -> None:
        """Raise ValueError, with its path, for a part that has no row for every particle."""
        self.parts(value, path)

    def parts(self, value: Any, path: str) -> list[Tensor]:
        """Return the tensors that would move. Raises ValueError for a part that cannot."""
        found: list[Tensor] = []

        def note(part: Any) -> Any:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, Ragged):
                found.extend(part.tensors.values())
            return part

        self._changed(value, path, note)
        return found

    def moved(self, value: Any, rows: Rows, path: str) -> Any:
        """Return the same nest with every row from where it continues."""
        return self._changed(value, path, lambda part: _moved(part, rows))

    def _changed(self, value: Any, path: str, change: Callable[[Any], Any]) -> Any:
        """Return the nest with a change made to every part that has a row for each particle."""
        if path in self.shared:
            self.met.add(path)
            return value
        if isinstance(value, _SAME_FOR_ALL):
            return value
        if isinstance(value, (Tensor, np.ndarray)):
            self._check_rows(value, path)
            return change(value)
        if isinstance(value, Ragged):
            self._check_count(value.graphs, "graphs", path)
            return change(value)
        if isinstance(value, Mapping):
            inner = {key: self._changed(part, f"{path}.{key}", change) for key, part in value.items()}
            return inner if type(value) is dict else _rebuilt(value, path, inner)
        if isinstance(value, (list, tuple)):
            items = [self._changed(part, f"{path}.{i}", change) for i, part in enumerate(value)]
            named = hasattr(value, "_fields")
            return type(value)(*items) if named else _rebuilt(value, path, items)
        if is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value, path, change)
        raise ValueError(
            f"{path} is a {type(value).__name__}, which a crowd cannot move: make it tensors with a row for "
            f"every particle, or name it in shared=({path!r},) where it is the same for all"
        )

    def _dataclass(self, value: Any, path: str, change: Callable[[Any], Any]) -> Any:
        """Return a copy of a dataclass with its parts changed; its own attributes beside them are kept."""
        import copy

        made = copy.copy(value)
        for entry in fields(value):
            part = self._changed(getattr(value, entry.name), f"{path}.{entry.name}", change)
            object.__setattr__(made, entry.name, part)
        return made

    def _check_rows(self, value: Any, path: str) -> None:
        if not value.ndim:
            self._check_count(None, "", path)
        self._check_count(len(value), "first size", path)

    def _check_count(self, count: int | None, what: str, path: str) -> None:
        if count == self.rows:
            return
        first = "no first size" if count is None else f"{what} {count}"
        raise ValueError(
            f"{path} has {first}, but the crowd has {self.rows} rows: give it a row for every particle, name "
            f"it in shared=({path!r},) where it is the same for all, or use crowd.ragged for graphs"
        )


def _moved(part: Any, rows: Rows) -> Any:
    if isinstance(part, Ragged):
        return part.moved(rows.source)
    return part[rows.source.numpy()] if isinstance(part, np.ndarray) else rows.take(part)


def _rebuilt(value: Any, path: str, inner: Any) -> Any:
    """Return a container of the same type. ValueError for one that cannot be built from its items alone."""
    if type(value) in (list, tuple, dict):
        return type(value)(inner)
    try:
        return type(value)(inner)
    except TypeError:
        raise ValueError(
            f"{path} is a {type(value).__name__}, which cannot be built anew from its items: use a dict, a "
            "list, a tuple or a dataclass"
        ) from None
