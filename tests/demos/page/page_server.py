"""A page that is served in a process of its own, on Shapes, for the tests of a module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Served:
    """Where a page is, its process, its folder, and what it wrote to the error stream."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path
    errors: Path
    temporary: Path


@contextmanager
def served(home: Path, *words: str, model: str = "shapes") -> Iterator[Served]:
    """Yield a page that is ready; the environment tries to open doors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = home / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
        "GRADIO_SHARE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",  # noqa: S104
        "GRADIO_ALLOWED_PATHS": "/",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "diffplug",
        "demo",
        "--no-browser",
        "--port",
        str(port),
        "--model",
        model,
    ]
    errors = home / "errors"
    with open(errors, "wb") as stream:
        process = subprocess.Popen(
            [*command, "-o", str(home / "out"), *words], stderr=stream, env=environment, cwd=ROOT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, errors)
        yield Served(url, process, home / "out", errors, temporary)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # a machine that others use too
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], errors: Path) -> None:
    until = time.monotonic() + 100
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/config", timeout=5).read()  # noqa: S310
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no page: {errors.read_text()}")
