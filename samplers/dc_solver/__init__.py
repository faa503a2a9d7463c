"""DC-Solver: UniPC that compensates its stored outputs by one ratio per step (arXiv 2409.03755)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.dc_solver.plug import DCSolver as DCSolver
    from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial as CompensationPolynomial
    from diffplug.samplers.dc_solver.scheduler import DCSolverScheduler as DCSolverScheduler
    from diffplug.samplers.dc_solver.scheduler import SchedulerMixin as SchedulerMixin

_HOMES = {
    "CompensationPolynomial": "diffplug.samplers.dc_solver.polynomial",
    "DCSolver": "diffplug.samplers.dc_solver.plug",
    "DCSolverScheduler": "diffplug.samplers.dc_solver.scheduler",
    "SchedulerMixin": "diffplug.samplers.dc_solver.scheduler",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
