"""Checks of options that several steerers share; each raises a ValueError of one line."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number (NaN is one)."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise ValueError(f"{name}={value!r}: it must be a number")


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: it must be a whole number of at least 1")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless a seed is a whole number, or a sequence with one for each prompt."""
    if isinstance(seed, str) or not isinstance(seed, (int, Sequence)):
        raise ValueError(f"seed={seed!r}: give a whole number, or a list with one for each prompt")
    for one in seed if isinstance(seed, Sequence) else ():
        if not isinstance(one, Integral):
            raise ValueError(f"seed contains {one!r}: seeds are whole numbers")


def check_texts(prompts: Any) -> None:
    """Raise ValueError unless prompts are None, a text or a sequence of texts."""
    listed = isinstance(prompts, (list, tuple)) and all(isinstance(text, str) for text in prompts)
    if not (prompts is None or isinstance(prompts, str) or listed):
        raise ValueError(f"prompts={prompts!r}: give the texts of the call's prompts, as a list")
