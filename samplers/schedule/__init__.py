"""What a solver decides, as a value: steps, nodes, presets and grids by name, JSON both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.schedule.grids import GRIDS as GRIDS
    from diffplug.samplers.schedule.nodes import Nodes as Nodes
    from diffplug.samplers.schedule.presets import PRESETS as PRESETS
    from diffplug.samplers.schedule.schedule import SolverSchedule as SolverSchedule

_HOMES = {
    "GRIDS": "diffplug.samplers.schedule.grids",
    "Nodes": "diffplug.samplers.schedule.nodes",
    "PRESETS": "diffplug.samplers.schedule.presets",
    "SolverSchedule": "diffplug.samplers.schedule.schedule",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
