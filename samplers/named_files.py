"""Names that somebody gives to schedule files while a process lives: `--samplers six=six.json`."""

from __future__ import annotations

import os
import re

from diffplug.registry import sampler, sampler_names

__all__ = ["file_of", "forget", "name_file", "named"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,79}")
_FILES: dict[str, str] = {}


def name_file(name: str, path: str) -> None:
    """Let `name` stand for a searched schedule, ratios or a recipe; the file is read and checked at once.

    Raises ValueError for a name that is malformed or taken, and for a file that is none; OSError where it
    cannot be read.
    """
    if not _NAME.fullmatch(name) or name.endswith((".json", ".npy")):
        raise ValueError(f"a sampler's name is lower case letters, digits, '-', '+', '.', '_', got {name!r}")
    whole = os.path.abspath(path)
    if _FILES.get(name) == whole:
        return
    if name in sampler_names():
        raise ValueError(f"the sampler name {name!r} is taken: choose another one for {path!r}")
    if not path.endswith((".json", ".npy")):
        raise ValueError(f"sampler {name!r}: {path!r} is no .json or .npy file of a search")
    sampler(path, None)
    _FILES[name] = whole


def file_of(name: str) -> str | None:
    """Return the file that a name stands for; None for other names."""
    return _FILES.get(name)


def named() -> dict[str, str]:
    """Return the files by their names."""
    return dict(_FILES)


def forget(name: str) -> None:
    """Take a name away; unknown ones raise KeyError."""
    del _FILES[name]
