"""Samplers: the same picture from fewer network evaluations. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if __name__ != "diffplug.samplers":
    raise ImportError(f"import this package as `diffplug.samplers`, not as `{__name__}`")

if TYPE_CHECKING:
    from diffplug.samplers.dc_solver.plug import DCSolver as DCSolver
    from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial as CompensationPolynomial
    from diffplug.samplers.dc_solver.scheduler import DCSolverScheduler as DCSolverScheduler
    from diffplug.samplers.few_step.plug import FewStep as FewStep
    from diffplug.samplers.model_noise import NoiseLevels as NoiseLevels
    from diffplug.samplers.negative.guidance import NegativeGuidance as NegativeGuidance
    from diffplug.samplers.negative.nag import NAG as NAG
    from diffplug.samplers.negative.speedupnet import SpeedUpNet as SpeedUpNet
    from diffplug.samplers.schedule import presets as presets
    from diffplug.samplers.schedule.grids import GRIDS as GRIDS
    from diffplug.samplers.schedule.nodes import Nodes as Nodes
    from diffplug.samplers.schedule.presets import PRESETS as PRESETS
    from diffplug.samplers.schedule.schedule import SolverSchedule as SolverSchedule
    from diffplug.samplers.search.front import search_front as search_front
    from diffplug.samplers.search.search import search_compensation as search_compensation
    from diffplug.samplers.search.search import search_schedule as search_schedule
    from diffplug.samplers.search.search import tune_schedule as tune_schedule
    from diffplug.samplers.solver.compile import compile_schedule as compile_schedule
    from diffplug.samplers.solver.plug import Solver as Solver
    from diffplug.samplers.solver.scheduler import SolverScheduler as SolverScheduler
    from diffplug.samplers.solver.statistics import ModelStatistics as ModelStatistics
    from diffplug.samplers.solver.table import SolverTable as SolverTable

_HOMES = {
    "presets": "diffplug.samplers.schedule",
    "CompensationPolynomial": "diffplug.samplers.dc_solver.polynomial",
    "DCSolver": "diffplug.samplers.dc_solver.plug",
    "DCSolverScheduler": "diffplug.samplers.dc_solver.scheduler",
    "FewStep": "diffplug.samplers.few_step.plug",
    "GRIDS": "diffplug.samplers.schedule.grids",
    "NAG": "diffplug.samplers.negative.nag",
    "NegativeGuidance": "diffplug.samplers.negative.guidance",
    "SpeedUpNet": "diffplug.samplers.negative.speedupnet",
    "ModelStatistics": "diffplug.samplers.solver.statistics",
    "NoiseLevels": "diffplug.samplers.model_noise",
    "Nodes": "diffplug.samplers.schedule.nodes",
    "PRESETS": "diffplug.samplers.schedule.presets",
    "Solver": "diffplug.samplers.solver.plug",
    "SolverSchedule": "diffplug.samplers.schedule.schedule",
    "SolverScheduler": "diffplug.samplers.solver.scheduler",
    "SolverTable": "diffplug.samplers.solver.table",
    "compile_schedule": "diffplug.samplers.solver.compile",
    "search_compensation": "diffplug.samplers.search.search",
    "search_front": "diffplug.samplers.search.front",
    "search_schedule": "diffplug.samplers.search.search",
    "tune_schedule": "diffplug.samplers.search.search",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
