"""A method of one object, replaced for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A block in which an object has another method; what the object itself held comes back after it."""
    own = vars(owner).get(name)
    vars(owner)[name] = method
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if own is not None:
            vars(owner)[name] = own
