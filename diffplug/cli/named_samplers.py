"""`--samplers NAME=FILE`: searched schedules under names of one's own, for the life of a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

__all__ = ["Samplers", "name_samplers"]

Samplers = Annotated[
    list[str] | None,
    typer.Option(
        "--samplers",
        metavar="NAME=FILE",
        help="Call a searched schedule by a name, as six=six.json; give it once for each.",
    ),
]


def name_samplers(texts: Sequence[str] | None) -> dict[str, str]:
    """Return the files by the names that --samplers gives them, known to every recipe from now on.

    Raises ValueError, or ReadError, in one line for a text without a name or file, and for a file that is no
    schedule.
    """
    if not texts:
        return {}
    from diffplug.registry import name_sampler

    found: dict[str, str] = {}
    for text in texts:
        name, equals, file = (part.strip() for part in text.partition("="))
        if not (name and equals and file):
            raise ValueError(f"--samplers {text[:200]!r}: write NAME=FILE, as six=six.json")
        if found.get(name, file) != file:
            raise ValueError(f"--samplers names both {found[name]!r} and {file!r} {name!r}: take two names")
        name_sampler(name, file)
        found[name] = file
    return found
