"""Samplers: the same picture from fewer network evaluations. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "diffplug.samplers":
    raise ImportError(f"import this package as `diffplug.samplers`, not as `{__name__}`")

if TYPE_CHECKING:
    from diffplug.samplers.dc_solver import DCSolverScheduler
    from diffplug.samplers.dc_solver_plug import DCSolver

__all__ = ["DCSolver", "DCSolverScheduler"]

_HOMES = {
    "DCSolver": "diffplug.samplers.dc_solver_plug",
    "DCSolverScheduler": "diffplug.samplers.dc_solver",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
