"""Checks of what people give: options, and JSON of a known form; each raises a ValueError of one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from diffplug.messages import shown
from diffplug.registry import unknown


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number (NaN is one)."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise ValueError(f"{name}={shown(value)}: it must be a number")


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={shown(value)}: it must be a whole number of at least 1")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless a seed is a whole number, or a sequence with one for each prompt."""
    if isinstance(seed, str) or not isinstance(seed, (int, Sequence)):
        raise ValueError(f"seed={shown(seed)}: give a whole number, or a list with one for each prompt")
    for one in seed if isinstance(seed, Sequence) else ():
        if not isinstance(one, Integral):
            raise ValueError(f"seed contains {shown(one)}: seeds are whole numbers")


def check_texts(prompts: Any) -> None:
    """Raise ValueError unless prompts are None, a text or a sequence of texts."""
    listed = isinstance(prompts, (list, tuple)) and all(isinstance(text, str) for text in prompts)
    if not (prompts is None or isinstance(prompts, str) or listed):
        raise ValueError(f"prompts={shown(prompts)}: give the texts of the call's prompts, as a list")


def finite(name: str, value: Any) -> float:
    """The value as a float. Raises ValueError unless it is a finite number."""
    if type(value) is float and math.isfinite(value):  # nearly always
        return value
    if not is_finite(value):
        raise ValueError(f"{name} is {shown(value)}: give a finite number")
    return float(value)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def whole(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int. Raises ValueError unless it is a whole number in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}: allowed are whole numbers from {low} to {high}")
    return value


def numbered(index: int, read: Any, document: Any) -> Any:
    try:
        return read(document)
    except ValueError as error:
        raise ValueError(f"step {index}: {error}") from None


def check_keys(what: str, document: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError, with the nearest known name, for a key that is not known."""
    for key in document:
        if key not in known:
            raise unknown(f"key of a {what}", key, list(known))


def as_object(name: str, value: Any, known: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return a JSON object as it is. Raises ValueError for other values, and keys that are not `known`."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has to be a JSON object, got {shown(value)}")
    if known and not value.keys() <= set(known):
        check_keys(name.removeprefix("a "), value, known)
    return value


def as_list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name} has to be a list, got {shown(value)}")
    return value


def as_numbers(name: str, value: Any) -> tuple[Any, ...] | None:
    return None if value is None else tuple(as_list(name, value))
