"""Files that are whole or absent, names that stay inside their folder, and JSON."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "ReadError",
    "WriteError",
    "alive",
    "atomic_path",
    "atomic_write",
    "host",
    "output_file",
    "output_folder",
    "read_bytes",
    "read_json",
    "safe_join",
    "sweep_temporaries",
    "sync",
    "sync_folder",
    "write_json",
    "write_new",
]

MOST_DIGITS = 300  # of a whole number in JSON; more are no float
_ENDLESS = re.compile(rf"(?<![\d.\w\"])\d{{{MOST_DIGITS + 1},}}")

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TEMPORARY = re.compile(r"\..*\.tmp-(?:([0-9a-f]{6})-)?(\d+)-[0-9a-f]{8}(?:\..*)?")
_DAY = 86_400.0

_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789"}
_FORBIDDEN = set('/\\:*?"<>|\u2044\u2215\u29f8\uff0f\uff3c')


class ReadError(OSError):
    """A file that could not be read; the message is one line: which one, why, what to do."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"cannot read {os.fspath(path)!r}: {reason}")


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
    """Yield a temporary path beside `path` (same suffix) that takes its place when the block ends well.

    After an exception, in the block or here, no trace is left and an older `path` is untouched. The file
    reaches the disk (fsync) before it gets its name. Raises WriteError where the system refuses.
    """
    with _temporary(Path(path), os.replace) as temporary:
        yield temporary


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` whole or not at all; raise WriteError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_new(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write `data` to `path` whole, unless a file of that name exists: then return False and leave it alone.

    Of several processes that want one name, one gets it. Raises WriteError where the system refuses.
    """
    try:
        with _temporary(Path(path), _claim) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        return False
    return True


@contextmanager
def _temporary(target: Path, put: Callable[[Path, Path], None]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; `put` gives it its name when the block ends well."""
    stem = target.stem.encode()[:128].decode(errors="ignore")
    token = f"{host()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = target.with_name(f".{stem}.tmp-{token}{target.suffix}")
    try:
        yield temporary
        _give_usual_mode(temporary)
        sync(temporary)
        put(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _claim(temporary: Path, target: Path) -> None:
    """Give a file its name; FileExistsError where the name is taken, also by a link that leads nowhere."""
    if os.name == "nt":  # there a rename refuses names that are taken
        os.rename(temporary, target)
        return
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)  # a file system without hard links: the name first, then the file


def sweep_temporaries(folder: str | os.PathLike[str]) -> int:
    """Remove what killed processes left half-written in `folder`; return how many files that were.

    A temporary file goes when its process was on this host and is dead, or when it is older than a day.
    """
    swept = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(OSError):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
                if old or (match[1] == host() and not alive(int(match[2]))):
                    os.unlink(entry.path)
                    swept += 1
    return swept


@functools.cache
def host() -> str:
    """Return six characters that tell this host from others that share a folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def alive(pid: int) -> bool:
    """Return whether a process of this host is there; always true where one cannot ask."""
    if os.name == "nt":  # signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, whole or not at all; NaN and infinity raise ValueError."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} cannot hold this value as JSON: {error}") from error
    atomic_write(path, text + "\n")


def read_json(path: str | os.PathLike[str], *, limit: int = 8 * 2**20) -> Any:
    """Return the value in a JSON file; ValueError names the file and the line where it is not JSON.

    limit: bytes that the file may have. Raises ReadError as `read_bytes` does.
    """
    try:
        text = read_bytes(path, limit=limit).decode("utf-8-sig")
        _check_digits(text)
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{os.fspath(path)!r} is not valid JSON: it is nested too deeply") from None


def read_bytes(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """Return what is in a file of at most `limit` bytes.

    Raises ReadError, which names the file: it is missing, a folder, no regular file (a pipe, a device), too
    large, or not readable.
    """
    file = Path(path)
    try:
        found = file.stat()
        if stat.S_ISDIR(found.st_mode):
            raise ReadError(path, "it is a folder. Give the name of a file in it.")
        if not stat.S_ISREG(found.st_mode):
            raise ReadError(path, "it is no regular file. Write its content to a file first.")
        if found.st_size > limit:
            raise ReadError(
                path, f"it has {found.st_size / 2**20:.1f} MiB, and {limit / 2**20:g} MiB are allowed."
            )
        return file.read_bytes()
    except FileNotFoundError:
        raise ReadError(path, f"no such file in {os.fspath(file.absolute().parent)!r}.") from None
    except ReadError:
        raise
    except OSError as error:
        raise ReadError(path, f"{error.strerror or error}.") from error


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder `path`, made if missing, tried with a small file, and swept of half-written ones.

    Raises WriteError where that fails, and ValueError for an empty name.
    """
    if not os.fspath(path):
        raise ValueError("the name of the output folder is empty: give a folder, or . for the current one")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.tmp-{host()}-{os.getpid()}-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except FileExistsError as error:
        raise WriteError(folder, OSError(errno.ENOTDIR, "it is a file, not a folder")) from error
    except OSError as error:
        raise WriteError(folder, error) from error
    sweep_temporaries(folder)
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
    try:
        inside = joined.resolve().is_relative_to(base)
    except (RuntimeError, OSError) as error:  # a link to itself
        raise ValueError(f"{os.path.join(*parts)!r} in {os.fspath(root)!r} is a link in a circle") from error
    if not inside:
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


def _check_digits(text: str) -> None:
    """Raise ValueError for a number of so many digits that no float holds it."""
    if match := _ENDLESS.search(text):
        raise ValueError(f"a whole number of {len(match[0])} digits, {MOST_DIGITS} are allowed")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _give_usual_mode(path: Path) -> None:
    """Let others read what a library wrote for its owner alone (safetensors), as far as the umask allows."""
    if os.name != "nt" and path.stat().st_mode & 0o777 == 0o600:
        path.chmod(0o666 & ~_umask())


@functools.cache
def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Bring a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable where the system can: not on Windows, not on every network disk."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
