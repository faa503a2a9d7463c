"""Samplers: the same picture from fewer network evaluations. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "diffplug.samplers":
    raise ImportError(f"import this package as `diffplug.samplers`, not as `{__name__}`")

if TYPE_CHECKING:
    from diffplug.samplers.compiler import compile_schedule
    from diffplug.samplers.dc_solver import DCSolverScheduler
    from diffplug.samplers.dc_solver_plug import DCSolver
    from diffplug.samplers.few_step.plug import FewStep
    from diffplug.samplers.grids import GRIDS
    from diffplug.samplers.nodes import Nodes
    from diffplug.samplers.noise_levels import NoiseLevels
    from diffplug.samplers.polynomial import CompensationPolynomial
    from diffplug.samplers.presets import PRESETS
    from diffplug.samplers.schedule import SolverSchedule
    from diffplug.samplers.search.compensation import search_compensation
    from diffplug.samplers.search.front import search_front
    from diffplug.samplers.search.schedule_search import search_schedule
    from diffplug.samplers.search.tuning import tune_schedule
    from diffplug.samplers.solver import SolverScheduler
    from diffplug.samplers.solver_plug import Solver
    from diffplug.samplers.statistics import ModelStatistics
    from diffplug.samplers.table import SolverTable

__all__ = [
    "GRIDS",
    "PRESETS",
    "CompensationPolynomial",
    "DCSolver",
    "DCSolverScheduler",
    "FewStep",
    "ModelStatistics",
    "Nodes",
    "NoiseLevels",
    "Solver",
    "SolverSchedule",
    "SolverScheduler",
    "SolverTable",
    "compile_schedule",
    "search_compensation",
    "search_front",
    "search_schedule",
    "tune_schedule",
]

_HOMES = {
    "CompensationPolynomial": "diffplug.samplers.polynomial",
    "DCSolver": "diffplug.samplers.dc_solver_plug",
    "DCSolverScheduler": "diffplug.samplers.dc_solver",
    "FewStep": "diffplug.samplers.few_step.plug",
    "GRIDS": "diffplug.samplers.grids",
    "ModelStatistics": "diffplug.samplers.statistics",
    "NoiseLevels": "diffplug.samplers.noise_levels",
    "Nodes": "diffplug.samplers.nodes",
    "PRESETS": "diffplug.samplers.presets",
    "Solver": "diffplug.samplers.solver_plug",
    "SolverSchedule": "diffplug.samplers.schedule",
    "SolverScheduler": "diffplug.samplers.solver",
    "SolverTable": "diffplug.samplers.table",
    "compile_schedule": "diffplug.samplers.compiler",
    "search_compensation": "diffplug.samplers.search.compensation",
    "search_front": "diffplug.samplers.search.front",
    "search_schedule": "diffplug.samplers.search.schedule_search",
    "tune_schedule": "diffplug.samplers.search.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
