"""Files that are whole or absent, names that stay inside their folder, and JSON."""

from __future__ import annotations

import json
import os
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "WriteError",
    "atomic_path",
    "atomic_write",
    "output_file",
    "output_folder",
    "read_json",
    "safe_join",
    "write_json",
]

_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789"}
_FORBIDDEN = set('/\\:*?"<>|\u2044\u2215\u29f8\uff0f\uff3c')


class WriteError(OSError):
    """A file or folder that could not be written; the message is one line: which one, why, what to do."""

    def __init__(self, path: str | os.PathLike[str], cause: OSError) -> None:
        reason = cause.strerror or str(cause) or type(cause).__name__
        super().__init__(
            f"cannot write {os.fspath(path)!r}: {reason}. Choose a folder that can be written to."
        )
        self.errno = cause.errno


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix) that takes its place when the block ends well.

    After an exception, in the block or here, no trace is left and an older `path` is untouched. The file
    reaches the disk (fsync) before it gets its name. Raises WriteError where the system refuses.
    """
    target = Path(path)
    stem = target.stem.encode()[:128].decode(errors="ignore")
    temporary = target.with_name(f".{stem}.tmp-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) to `path` whole or not at all; raises WriteError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, whole or not at all; NaN and infinity raise ValueError."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} cannot hold this value as JSON: {error}") from error
    atomic_write(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; ValueError names the file and the line where it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not valid JSON: {error}") from error


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made if missing and tried with a small file; WriteError where that fails."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise WriteError(folder, error) from error
    return folder


def output_file(path: str | os.PathLike[str]) -> Path:
    """The file `path`, in a folder that is made if missing and can be written to; ValueError for a folder."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{os.fspath(path)!r} is a folder: give the name of a file in it")
    output_folder(file.parent)
    return file


def safe_join(root: str | os.PathLike[str], *parts: str) -> Path:
    """`root` joined with `parts`, each a plain file or folder name; the result lies under `root` for certain.

    Refuses with ValueError: separators of any script, "..", drive letters, control characters, names that
    Windows reserves, trailing dots and blanks, more than 255 bytes, and symbolic links that lead outside.
    """
    for part in parts:
        if trouble := _trouble(part):
            raise ValueError(f"{part!r} cannot be a file name: {trouble}. Use letters, digits, '-' and '_'.")
    base = Path(root).resolve()
    joined = base.joinpath(*parts)
    if not joined.resolve().is_relative_to(base):
        raise ValueError(
            f"{os.path.join(*parts)!r} leads outside {os.fspath(root)!r} through a symbolic link"
        )
    return joined


def _trouble(part: str) -> str:
    """Why `part` is no portable file name; empty if it is one."""
    plain = unicodedata.normalize("NFKC", part)
    if not part or not plain.strip(". "):
        return "it is empty or only dots"
    if bad := sorted(
        (_FORBIDDEN & {*part, *plain}) | {c for c in plain if unicodedata.category(c)[0] == "C"}
    ):
        return f"it has the character {bad[0]!r}"
    if plain[-1] in ". " or plain[0] == " ":
        return "it begins with a blank or ends with a blank or a dot"
    if plain.split(".")[0].strip().lower() in _RESERVED:
        return "the name is reserved on Windows"
    return "it is longer than 255 bytes" if len(part.encode("utf-8")) > 255 else ""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable where the system can (not on Windows, not on every network file system)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
