"""Settings in a line: "sampler=ddim,steps=20,negative_prompt='lowres, bad hands',options='churn=1.0'"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from diffplug.registry import unknown

__all__ = ["read_options", "read_settings"]


def read_settings(text: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the settings of a line, each of its kind (str, int, float, or dict for options in quotes).

    Raises ValueError for an unknown or repeated key, a value of another kind, and a quote that is not closed.
    """
    values: dict[str, Any] = {}
    for key, equals, value in _pairs(text):
        if key not in kinds:
            hint = f"In the recipe {_short(text)}; a value with a comma in it stands in quotes."
            raise unknown("setting", key[:80], sorted(kinds), hint)
        if not equals or key in values:
            raise ValueError(f"recipe {_short(text)}: write {key}=value, once")
        values[key] = _read(key, value, kinds[key])
    return values


def read_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Return options from texts such as "churn=1.0" or "returns=all": JSON where it is, else words."""
    options: dict[str, Any] = {}
    for text in pairs:
        for key, equals, value in _pairs(text):
            if not equals or not key.isidentifier() or key in options:
                raise ValueError(f"option {_short(text)}: write name=value, as churn=1.0, each name once")
            options[key] = _value(value)
    return options


def _read(key: str, value: str, kind: type) -> Any:
    if kind is dict:
        return read_options([value])
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{key} must be a number, got {_short(value)}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _pairs(text: str) -> Iterable[tuple[str, str, str]]:
    """Yield key, equals sign and value of every pair; commas inside quotes or brackets separate nothing."""
    for part in _parts(text):
        if part.strip():
            key, equals, value = (side.strip() for side in part.partition("="))
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            yield key, equals, value


def _parts(text: str) -> list[str]:
    parts, quote, depth = [""], "", 0
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1].rstrip().endswith("="):
            quote = letter
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth = max(0, depth - 1)
        elif letter == "," and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    if quote:
        raise ValueError(f"recipe {_short(text)}: the quote {quote} is not closed")
    return parts


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
