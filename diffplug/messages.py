"""Values and errors as a one-line message quotes them: cut where they are long."""

from __future__ import annotations

from typing import Any

__all__ = ["LONGEST_QUOTE", "reason", "shown"]

LONGEST_QUOTE = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """Return a value as a message quotes it: its repr, cut to 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."


def reason(error: BaseException) -> str:
    """Return what an error says in its first line, or its name where it says none; cut behind a word,
    to 160 characters."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if len(text) <= 2 * LONGEST_QUOTE:
        return text
    whole, _, _ = text[: 2 * LONGEST_QUOTE - 3].rpartition(" ")
    return f"{whole or text[: 2 * LONGEST_QUOTE - 4]} ..."
