"""Prompts from a file: a text with one in each line, a CSV with a header, or JSONL."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffplug.files import read_bytes
from diffplug.registry import unknown

__all__ = ["Prompt", "check_prompt", "read_prompts"]

LONGEST = 4_000
"""Characters that a prompt may have; text encoders read a few hundred at most."""

_LARGEST = 64 * 2**20
_KEYS = ("prompt", "negative_prompt", "seed")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a file may say beside it."""

    text: str
    negative: str | None = None
    seed: int | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a file in its order.

    `.csv` has a header with a column "prompt", and perhaps "negative_prompt" and "seed"; `.jsonl` has a text
    or an object with these keys in each line; anything else has a prompt in each line. UTF-8, with or without
    a byte order mark; blank lines are passed over. Raises ReadError for a file that cannot be read, and
    ValueError, with file and line, for anything else.
    """
    file, lines = str(path), _lines(path)
    reader = {".csv": _from_csv, ".jsonl": _from_jsonl}.get(Path(path).suffix.lower(), _from_text)
    found = []
    for number, row in reader(file, lines):
        found.append(_prompt(f"{file}:{number}", row))
    if not found:
        raise ValueError(f"{file!r} holds no prompt: write one in each line")
    return found


def check_prompt(where: str, text: str) -> None:
    """Raise ValueError for a prompt that no pipeline can take: blank, no Unicode, much too long."""
    if not text.strip():
        raise ValueError(f"{where} is blank: say what the picture should show")
    if len(text) > LONGEST:
        raise ValueError(f"{where} has {len(text):,} characters, and {LONGEST:,} are allowed")
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character in it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid UTF-8: write it again") from None


def _lines(path: str | Path) -> list[str]:
    """Return the lines of a file without their ends."""
    data = read_bytes(path, limit=_LARGEST)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{str(path)!r} is UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        bad = data[error.start]
        raise ValueError(
            f"{path}:{line}: the byte 0x{bad:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def _from_text(file: str, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _from_jsonl(file: str, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: no JSON: {str(error) or 'nested too deeply'}") from None
        yield number, {"prompt": row} if isinstance(row, str) else row


def _from_csv(file: str, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO("\n".join(lines)), strict=True, restkey="")
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f"{file}:1: the header has no column 'prompt': begin with prompt,seed")
        for row in reader:
            if "" in row:
                raise ValueError(
                    f"{file}:{reader.line_num}: more values than columns: put quotes round commas"
                )
            if any(value and value.strip() for value in row.values()):
                yield reader.line_num, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: no CSV: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _prompt(where: str, row: Any) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a text or an object is expected, got {type(row).__name__}")
    for key in row:
        if key not in _KEYS:
            raise ValueError(f"{where}: {unknown('key', str(key)[:80], list(_KEYS))}")
    text, negative = row.get("prompt"), row.get("negative_prompt")
    if not isinstance(text, str) or not isinstance(negative, (str, type(None))):
        raise ValueError(f"{where}: prompt and negative_prompt are texts, and a prompt is needed")
    check_prompt(f"{where}: the prompt", text)
    if negative:
        check_prompt(f"{where}: the negative prompt", negative)
    return Prompt(text, negative, _seed(where, row.get("seed")))


def _seed(where: str, given: Any) -> int | None:
    if given is None:
        return None
    text = given.strip() if isinstance(given, str) else given
    value = int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 20 else text
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{where}: seed is {str(given)[:80]!r}: a whole number from 0 to 2^63-1 is expected")
    return value
