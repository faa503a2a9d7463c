"""What a page may ask for: every value has a type and a range, whatever a browser or a script sends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffplug.messages import shown
from diffplug.registry import unknown

__all__ = ["BUDGET", "LIMITS", "LONGEST_PROMPT", "MOST_CELLS", "SECONDS", "choice", "number", "text"]

LONGEST_PROMPT = 500
MOST_CELLS = 6  # of a grid, each way
SECONDS = 120.0  # of one request
BUDGET = 6_400  # steps times particles times pictures


@dataclass(frozen=True)
class Limit:
    """The range of a number."""

    low: float
    high: float
    whole: bool


LIMITS = {
    "steps": Limit(1, 100, True),
    "guidance": Limit(0, 30, False),
    "seed": Limit(0, 2**53 - 1, True),  # beyond it browsers round
    "particles": Limit(1, 16, True),
    "pictures": Limit(1, 8, True),
    "strength": Limit(0, 1000, False),
}


def number(name: str, value: Any) -> Any:
    """Return a number of the form in its range, an int where it is whole. Raises ValueError of one line."""
    limit = LIMITS[name]
    kind = "a whole number" if limit.whole else "a number"
    wanted = f"{name} must be {kind} from {limit.low:.0f} to {limit.high:.0f}, got {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(wanted)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite or not limit.low <= value <= limit.high or (limit.whole and value != int(value)):
        raise ValueError(wanted)
    return int(value) if limit.whole else float(value) + 0.0


def text(name: str, value: Any, *, empty: bool = False) -> str:
    """Return a text that a pipeline can take. Raises ValueError of one line."""
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    if len(value) > LONGEST_PROMPT:
        raise ValueError(f"{name} has {len(value):,} characters, and {LONGEST_PROMPT} are allowed")
    if "\0" in value:
        raise ValueError(f"{name} has a NUL character in it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is no valid Unicode: write it again") from None
    if not empty and not value.strip():
        raise ValueError(f"{name} is blank: say what the picture should show")
    return value.strip()


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Return one of the names that the page offers. Raises ValueError with the nearest."""
    if not isinstance(value, str) or value not in known:
        raise unknown(name, str(value)[:80].encode("utf-8", "replace").decode(), list(known))
    return value
