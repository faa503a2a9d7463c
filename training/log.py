"""The log of a run: a line of JSON an update, and the trackers that Accelerate knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffplug.files import WriteError, atomic_write

__all__ = ["Log"]


class Log:
    """`log.jsonl`, written by the first process; a resumed run drops the lines that it writes again."""

    def __init__(
        self, path: Path, accelerator: Any, trackers: Sequence[str], config: Mapping[str, Any]
    ) -> None:
        self.path, self.accelerator, self.trackers = path, accelerator, tuple(trackers)
        self.config = dict(config)

    def begin(self, update: int) -> None:
        """Keep the lines before `update`, and open the trackers."""
        if self.accelerator.is_main_process and self.path.exists():
            kept = [line for line in self.path.read_text("utf-8").splitlines() if _before(line, update)]
            atomic_write(self.path, "".join(f"{line}\n" for line in kept))
        if self.trackers:
            self.accelerator.init_trackers("diffplug", config=_flat(self.config))

    def update(self, update: int, figures: Mapping[str, float]) -> None:
        """Note the figures of an update."""
        self._write({"update": update, **{name: _rounded(value) for name, value in figures.items()}})
        if self.trackers:
            self.accelerator.log(dict(figures), step=update)

    def event(self, what: str, **figures: Any) -> None:
        """Note something that happened between updates."""
        self._write({"event": what, **figures})

    def close(self) -> None:
        """Close the trackers."""
        if self.trackers:
            self.accelerator.end_training()

    def _write(self, values: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise WriteError(self.path, error) from error


def _before(line: str, update: int) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False  # half a line, from a run that was killed
    return "update" not in values or values["update"] < update


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{where}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: _scalar(value)}
    return flat


def _scalar(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
