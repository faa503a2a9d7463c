"""Who makes a shard: a lease that several processes, on one machine or many, can take, lose and take over.

A lease only saves work. What is right on the disk follows from renames alone: two processes that make the
same shard make the same bytes, and one of them is second.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffplug.files import alive, host, write_new

__all__ = ["LIFE", "Lease", "owner_is_dead"]

LIFE = 120.0
"""Seconds after the last heartbeat from which on a lease of another host may be taken over."""

_BEAT = 10.0


class Lease:
    """The right to make a shard: a file `<key>.lease` in the folder of work, touched every ten seconds."""

    def __init__(self, folder: Path, key: str, life: float = LIFE) -> None:
        self.path, self.life = folder / f"{key}.lease", life
        self.name = f"{host()}-{os.getpid()}-{secrets.token_hex(4)}"

    def take(self) -> bool:
        """Return whether this process has the lease now; one of a dead process is taken over."""
        for _ in range(2):
            if write_new(self.path, json.dumps({"owner": self.name}).encode()):
                return True
            if not self._bury():
                return False
        return False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Touch the file while the block runs, and give the lease back at its end."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(_BEAT):
                with suppress(OSError):  # taken over: the rename at the end decides
                    os.utime(self.path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.drop()

    def drop(self) -> None:
        """Give the lease back, unless another process took it over."""
        if self._owner() == self.name:
            with suppress(OSError):
                self.path.unlink()

    def _bury(self) -> bool:
        """Take a stale lease away; False where it is alive."""
        owner = self._owner()
        if owner is not None and not (owner_is_dead(owner) or self._silent()):
            return False
        grave = self.path.with_name(f".{self.path.name}.{self.name}")
        with suppress(FileNotFoundError):  # another process was first
            os.rename(self.path, grave)
            grave.unlink()
        return True

    def _owner(self) -> str | None:
        try:
            return str(json.loads(self.path.read_text("utf-8"))["owner"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _silent(self) -> bool:
        """Return whether the last heartbeat is too long ago, by the clock of the file system."""
        clock = self.path.with_name(f".{self.name}.clock")
        try:
            clock.touch()
            return clock.stat().st_mtime - self.path.stat().st_mtime >= self.life
        except FileNotFoundError:
            return True
        finally:
            clock.unlink(missing_ok=True)


def owner_is_dead(owner: str) -> bool:
    """Return whether the owner was a process of this host that is gone."""
    parts = owner.split("-")
    return len(parts) == 3 and parts[0] == host() and parts[1].isdecimal() and not alive(int(parts[1]))
