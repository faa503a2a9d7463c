"""Solvers as tables: compiled once a run, and the Diffusers scheduler that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.solver.compile import compile_schedule as compile_schedule
    from diffplug.samplers.solver.plug import Solver as Solver
    from diffplug.samplers.solver.scheduler import SchedulerMixin as SchedulerMixin
    from diffplug.samplers.solver.scheduler import SolverScheduler as SolverScheduler
    from diffplug.samplers.solver.statistics import ModelStatistics as ModelStatistics
    from diffplug.samplers.solver.table import SolverTable as SolverTable

_HOMES = {
    "ModelStatistics": "diffplug.samplers.solver.statistics",
    "SchedulerMixin": "diffplug.samplers.solver.scheduler",
    "Solver": "diffplug.samplers.solver.plug",
    "SolverScheduler": "diffplug.samplers.solver.scheduler",
    "SolverTable": "diffplug.samplers.solver.table",
    "compile_schedule": "diffplug.samplers.solver.compile",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
