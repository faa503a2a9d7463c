"""Where a scheduler stands: the timestep and step index it would use now, as host numbers.

Schedulers count privately: ``step`` moves ``_step_index`` and some of them start counting only inside
``step``. These functions give the answer a ``step`` call would find and change nothing. Numbers come from the
host: tables on the CPU are read directly, tables on a device are copied once and read from the copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SAME = 1e-6  # two timesteps are one when they differ by less than this share of their size
_copies: Any = WeakTensorKeyDictionary()  # device table -> (its version, its values on the host)


def host(table: Tensor, i: int) -> float:
    """Return entry ``i`` of a 1-D ``table`` in float64; a table on a device is copied once per version."""
    if table.device.type == "cpu":
        return float(table[i])
    return float(_copy(table)[i])


def _copy(table: Tensor) -> list[float]:
    version = -1 if table.is_inference() else table._version
    kept = _copies.get(table)
    if kept is None or kept[0] != version:
        kept = _copies[table] = (version, table.detach().cpu().double().tolist())
    return kept[1]


def timestep_value(scheduler: Any, timestep: Any) -> float:
    """Return ``timestep`` as a host number; entries of ``scheduler.timesteps`` on a device cost no sync.

    timestep: number, or tensor with one element. Raises ValueError for a tensor with several.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep)
    if timestep.numel() != 1:
        raise ValueError(
            f"timestep has {timestep.numel()} values, allowed is one for the batch: call once per timestep"
        )
    if timestep.device.type == "cpu":
        return float(timestep.item())
    i = _entry(timestep, getattr(scheduler, "timesteps", None))
    return float(timestep.item()) if i is None else host(scheduler.timesteps, i)


def _entry(element: Tensor, table: Any) -> int | None:
    """Return the index at which ``element`` is a view into ``table``, or None."""
    if not isinstance(table, Tensor) or table.dtype != element.dtype or table.ndim != 1:
        return None
    if table.untyped_storage().data_ptr() != element.untyped_storage().data_ptr():
        return None
    i = (int(element.storage_offset()) - int(table.storage_offset())) // max(table.stride(0), 1)
    return i if 0 <= i < len(table) else None


def step_index(scheduler: Any, timestep: Any) -> int:
    """Return the index of the step that ``scheduler.step(..., timestep, ...)`` would take now.

    The scheduler's own order is kept: its running ``step_index``, else its ``begin_index``, else the place of
    ``timestep`` in its ``timesteps`` (the second place where there are several, as schedulers do). A running
    index past the last step belongs to a finished run and is passed over. Raises ValueError for an unknown
    timestep.
    """
    running = getattr(scheduler, "step_index", None)
    if running is None:
        begin = getattr(scheduler, "begin_index", None)
        return find(scheduler, timestep) if begin is None else int(begin)
    return int(running) if running < len(scheduler.timesteps) else find(scheduler, timestep)


def find(scheduler: Any, timestep: Any) -> int:
    """Return the place of ``timestep`` in ``scheduler.timesteps``, the second one if there are several."""
    value = timestep_value(scheduler, timestep)
    table = scheduler.timesteps
    values = table.tolist() if table.device.type == "cpu" else _copy(table)
    places = [i for i, t in enumerate(values) if abs(t - value) <= _SAME * max(1.0, abs(value))]
    if not places:
        raise ValueError(
            f"timestep {value:g} is not one of the {len(values)} timesteps ({values[0]:g} ... "
            f"{values[-1]:g}) of {type(scheduler).__name__}: "
            "call set_timesteps, or pass an entry of scheduler.timesteps"
        )
    return places[1] if len(places) > 1 else places[0]


@dataclass(frozen=True)
class StepPosition:
    """A place in a schedule: a ``fixed`` step index, or (None) where the scheduler stands at ``timestep``."""

    timestep: Any
    fixed: int | None = None

    def index(self, scheduler: Any) -> int:
        """Return the step index: the fixed one, or the one a ``step`` call would take now."""
        return step_index(scheduler, self.timestep) if self.fixed is None else self.fixed

    def train_timestep(self, scheduler: Any) -> int:
        """Return the integer training timestep at this place."""
        if self.fixed is not None:
            return int(host(scheduler.timesteps, self.fixed))
        return int(timestep_value(scheduler, self.timestep))


def base_name(scheduler: Any, names: frozenset[str]) -> str:
    """Return the first of ``names`` among a scheduler's class and its ancestors, else an empty string."""
    return next((c.__name__ for c in type(scheduler).__mro__ if c.__name__ in names), "")
