"""What one call of a pipeline tells a scheduler of ours, for its time alone, and never in the configuration.

A configuration is what copies, saved files and other pipelines with the same scheduler see: a decision of one
call has no place there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["CallRequest", "refuse_ddim_options", "requesting"]


@dataclass(frozen=True)
class CallRequest:
    """What a call asks for.

    guidance: None where it has none. sigmas: the grid that its pipeline does not hand on, if any. plugged:
    whether this comes from a plug at all.
    """

    guidance: float | None = None
    sigmas: Any = None
    plugged: bool = False


@contextmanager
def requesting(scheduler: Any, request: CallRequest) -> Iterator[None]:
    """Inside the block runs of the scheduler are those of this call."""
    before = scheduler.request
    scheduler.request = request
    try:
        yield
    finally:
        scheduler.request = before


def refuse_ddim_options(eta: float, clipped: bool | None) -> None:
    """Raise ValueError for what only DDIM does: noise between steps, and another output after clipping."""
    what = f"eta={eta:g}" if eta else f"use_clipped_model_output={clipped}"
    raise ValueError(f"{what} does nothing: this solver adds no noise; leave it out, or use DDIMScheduler")
