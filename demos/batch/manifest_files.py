"""Lines of a manifest file as values: what JSONL, CSV, parquet and text say, and where they say nonsense."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffplug.files import ReadError

__all__ = ["FromText", "LineError", "lines_of"]

_LONGEST_LINE = 2**20
_OBJECTS = ("options", "call", "meta")
_WHOLE = ("seed", "images", "steps", "particles", "width", "height")


class LineError(ValueError):
    """What is wrong in a line: `problems` begin with a column or a blank; a `fatal` one ends the reading."""

    def __init__(self, *problems: str, fatal: bool = False) -> None:
        super().__init__("; ".join(problems))
        self.problems, self.fatal = problems, fatal


class FromText(dict):
    """A row whose values were texts: numbers in it are still to be read."""


def lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every line; the value is a LineError where the line is none.

    Raises ReadError for a file that cannot be opened.
    """
    if not path.is_file():
        raise ReadError(path, "no such file" if not path.exists() else "it is no regular file")
    reader = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(
        path.suffix.lower(), _text
    )
    try:
        yield from reader(path)
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(path, f"{error.strerror or error}") from error


def _decoded(path: Path) -> Iterator[tuple[int, str | LineError]]:
    """Yield the lines of a UTF-8 file, without their ends."""
    with open(path, "rb") as file:
        number = 0
        while data := file.readline(_LONGEST_LINE + 1):
            number += 1
            if number == 1:
                if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                    yield number, LineError(" the file is UTF-16: save it as UTF-8", fatal=True)
                    return
                data = data.removeprefix(b"\xef\xbb\xbf")
            if len(data) > _LONGEST_LINE:
                while data and not data.endswith(b"\n"):
                    data = file.readline(_LONGEST_LINE)
                yield number, LineError(f" the line has more than {_LONGEST_LINE:,} bytes")
                continue
            try:
                yield number, data.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad = data[error.start]
                yield number, LineError(f"{error.start + 1}: the byte 0x{bad:02x} is not UTF-8")


def _text(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _decoded(path):
        if isinstance(line, LineError):
            yield number, line
        elif line.strip():
            yield number, line.strip()


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _decoded(path):
        if isinstance(line, LineError):
            yield number, line
        elif line.strip():
            yield number, _json(line)


def _json(line: str) -> Any:
    """Return the value of a line, or a LineError with the column where it ends to be JSON."""
    try:
        return json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_int)
    except json.JSONDecodeError as error:
        return LineError(f"{error.colno}: no JSON: {error.msg}")
    except ValueError as error:
        return LineError(f" {error}")
    except RecursionError:
        return LineError(" no JSON: nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double[:80]!r} stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _int(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows begin at the line where they begin, whatever line ends stand in their quotes."""
    broken: list[tuple[int, LineError]] = []

    def lines() -> Iterator[str]:
        for number, line in _decoded(path):
            if isinstance(line, LineError):
                broken.append((number, line))
                return
            yield line + "\n"

    reader = csv.reader(lines(), strict=True)
    header: list[str] = []
    number = 1
    try:
        for values in reader:
            if not header:
                header = [name.strip() for name in values]
                if "prompt" not in header or len(set(header)) < len(header):
                    yield 1, LineError(" the header needs a column 'prompt', each name once", fatal=True)
                    return
            elif len(values) > len(header):
                yield number, LineError(" more values than columns: put quotes round commas")
            elif any(value.strip() for value in values):
                yield number, _cells(dict(zip(header, values, strict=False)))
            number = reader.line_num + 1
    except csv.Error as error:
        yield number, LineError(f" no CSV: {error}", fatal=True)
    for place, trouble in broken:
        yield place, LineError(*trouble.problems, fatal=True)


def _cells(row: Mapping[str, str]) -> Any:
    """Return the row of texts, with what is JSON in it read; empty cells say nothing."""
    found = FromText()
    for name, value in row.items():
        if value == "":
            continue
        read = _json(value) if name in _OBJECTS else value
        if isinstance(read, LineError):
            return LineError(f" {name}: {read.problems[0].strip()}")
        found[name] = read
    return found


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(
            f'{str(path)!r}: parquet needs pyarrow: pip install "diffplug[batch]", or write JSONL'
        ) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(8192):
            for row in batch.to_pylist():
                number += 1
                yield number, _columns(row)
    except pyarrow.ArrowException as error:
        raise ReadError(path, f"it is no parquet file: {str(error).splitlines()[0][:160]}") from None


def _columns(row: Mapping[str, Any]) -> Any:
    """Return a row of columns; nulls say nothing, and whole numbers may have come as floats beside nulls."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if value is None:
            continue
        if name in _OBJECTS and isinstance(value, str):
            value = _json(value)
            if isinstance(value, LineError):
                return LineError(f" {name}: {value.problems[0].strip()}")
        elif name in _WHOLE and isinstance(value, float) and value.is_integer():
            value = int(value)
        found[name] = value
    return found
