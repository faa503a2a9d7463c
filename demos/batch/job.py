"""What a folder of pictures is bound to: model, layout, shard size and batches. Another job is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffplug
from diffplug.demos.batch.plan import FORMAT
from diffplug.files import output_folder, read_json, sweep_temporaries, write_new
from diffplug.registry import unknown

__all__ = ["LAYOUTS", "Job"]

LAYOUTS = ("folder", "tar", "geneval")
_BINDING = ("format", "model", "layout", "shard", "max_rows", "metadata")


@dataclass(frozen=True)
class Job:
    """How a batch is made and where it goes; every process of it has an equal one.

    model: the identity of the model. shard: mean number of pictures of a shard. max_rows: pictures times
    particles in a call. metadata: whether the pictures know their settings. max_failures: share of the first
    64 rows that may fail. keep_failed: rows that failed before are passed over. samplers: files by the names
    that recipes know them by. life: seconds of a lease without a heartbeat. run: what the
    processes of one start have in common.
    """

    folder: Path
    model: str
    layout: str = "folder"
    shard: int = 256
    max_rows: int = 32
    metadata: bool = True
    max_failures: float = 0.05
    keep_failed: bool = False
    samplers: Mapping[str, str] = field(default_factory=dict)
    life: float = 120.0
    run: str = field(default_factory=lambda: secrets.token_hex(6))
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, list(LAYOUTS))

    @property
    def work(self) -> Path:
        """Return the folder in which shards are made."""
        return self.folder / ".work"

    def binding(self) -> dict[str, Any]:
        """Return what must be the same whenever this folder is worked on."""
        values = asdict(self)
        return {name: values[name] for name in _BINDING}

    def check(self) -> None:
        """Raise ValueError where the folder belongs to another job; nothing is written."""
        path = self.folder / "job.json"
        if not path.is_file():
            return
        found = read_json(path)
        there = found if isinstance(found, dict) else {}
        wrong = [
            f"{k} {there.get(k)!r} there, {v!r} asked for"
            for k, v in self.binding().items()
            if there.get(k) != v
        ]
        if wrong:
            raise ValueError(
                f"{str(self.folder)!r} belongs to another batch ({'; '.join(wrong)}): choose another folder"
            )

    def start(self) -> None:
        """Bind the folder to this job: the first of several starters writes, the others compare."""
        output_folder(self.folder)
        versions = {"diffplug": diffplug.__version__, **_versions()}
        text = json.dumps({**self.binding(), "versions": versions}, indent=2) + "\n"
        if not (self.folder / "job.json").exists():
            write_new(self.folder / "job.json", text.encode())
        self.check()
        self.work.mkdir(exist_ok=True)
        for name in (".work", ".index", "failed"):
            sweep_temporaries(self.folder / name)

    def leave(self) -> None:
        """Unbind a folder in which nothing was begun, so that a corrected batch may be another job."""
        if not {path.name for path in self.folder.iterdir()} <= {"job.json", ".work"}:
            return
        if not any(self.work.iterdir()):
            self.work.rmdir()
            (self.folder / "job.json").unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers")}
