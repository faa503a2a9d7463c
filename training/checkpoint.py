"""Checkpoints: one is complete at every moment, whatever is killed when.

    checkpoints/update-00000250/
        weights.safetensors        the moving parameters, "group/name"
        average.safetensors        their exponential averages
        optimizer.safetensors      the optimiser's moments, "group/name/exp_avg"
        objective-00000.safetensors    what the objective keeps, one file a process where these differ
        state.json                 update, config, versions
        manifest.json              the hash of every file above, written last

A checkpoint is written into a hidden folder that gets its name when all is on the disk: every process
writes its part, the first one renames. Older ones are deleted only then. A checkpoint whose hashes do not
agree is passed over for the newest one that is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffplug.files import WriteError, read_json, write_json
from diffplug.training.config import differences

__all__ = ["FORMAT", "Checkpoints", "Saved", "take_up"]

FORMAT = 1
_PREFIX, _NEW = "update-", ".new-"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole. tensors: by file name without the suffix; state: `state.json`."""

    folder: Path
    state: dict[str, Any]

    @property
    def update(self) -> int:
        """How many updates had been made."""
        return int(self.state["update"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files, empty where there is none."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


class Checkpoints:
    """The checkpoints of a run in `folder`; the newest `keep` stay.

    rank: number of this process. wait: called where all processes have to have come so far.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, rank: int = 0, wait: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.keep, self.rank, self.wait = folder, keep, rank, wait

    def save(
        self,
        update: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        own: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of `update` whole or not at all; all processes call it together.

        tensors, state: the first process's are written. own: every process's are. Raises WriteError where
        the disk is full or read-only; the older checkpoints are untouched then.
        """
        fresh = self.folder / f"{_NEW}{_PREFIX}{update:08d}"
        try:
            if self.rank == 0:
                self._sweep()
                fresh.mkdir(parents=True)
            self.wait()
            for name, values in {**own, **(tensors if self.rank == 0 else {})}.items():
                _write_tensors(fresh / f"{name}.safetensors", values)
            self.wait()
            if self.rank == 0:
                self._finish(fresh, update, state)
        except OSError as error:
            raise error if isinstance(error, WriteError) else WriteError(fresh, error) from error
        self.wait()

    def _finish(self, fresh: Path, update: int, state: Mapping[str, Any]) -> None:
        write_json(fresh / "state.json", {"format": FORMAT, "update": update, **state})
        write_json(fresh / "manifest.json", {path.name: _hash(path) for path in sorted(fresh.iterdir())})
        place = self.folder / f"{_PREFIX}{update:08d}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what an earlier, killed save has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_NEW}*"):
            shutil.rmtree(left, ignore_errors=True)

    def all(self) -> list[Path]:
        """Return the folders of all checkpoints, oldest first, whole or damaged."""
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir())

    def newest(self) -> Saved | None:
        """Return the newest checkpoint that is whole, with a warning for each newer one that is not.

        Raises ValueError where there are checkpoints and all of them are damaged.
        """
        found = self.all()
        for folder in reversed(found):
            trouble = _trouble(folder)
            if not trouble:
                return Saved(folder, read_json(folder / "state.json"))
            warnings.warn(f"checkpoint {str(folder)!r} is passed over: {trouble}", stacklevel=2)
        if found:
            raise ValueError(
                f"every checkpoint in {str(self.folder)!r} is damaged: remove them to start anew"
            )
        return None


def take_up(checkpoints: Checkpoints, resume: bool | None, config: Mapping[str, Any]) -> Saved | None:
    """Return the checkpoint that a run with this config goes on from, None where it begins.

    resume: True demands one, False refuses one, None takes one that is there. Raises ValueError where that
    fails, and for a checkpoint of another config, with what differs.
    """
    saved, run = checkpoints.newest(), str(checkpoints.folder.parent)
    if resume and saved is None:
        raise ValueError(f"there is nothing to resume in {run!r}: begin without --resume")
    if resume is False and saved is not None:
        raise ValueError(
            f"{run!r} holds a run at update {saved.update}: add --resume, or take another folder"
        )
    if saved is not None and (found := differences(saved.state["config"], config)):
        raise ValueError(
            f"the checkpoint in {run!r} was made with another config ({'; '.join(found[:4])}): use the same "
            "config, or another folder"
        )
    return saved


def _write_tensors(path: Path, values: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    with path.open("wb") as file:
        file.write(save({name: value.detach().contiguous().cpu() for name, value in values.items()}))
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _trouble(folder: Path) -> str:
    """Return what is wrong with a checkpoint, empty for a whole one."""
    try:
        manifest = read_json(folder / "manifest.json")
        for name, digest in manifest.items():
            if _hash(folder / name) != digest:
                return f"{name} is not what was written"
        version = read_json(folder / "state.json")["format"]
        return "" if version == FORMAT else f"its format is {version}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return str(error) or type(error).__name__
