"""The nodes of one run: given ones as they are, those of a schedule, or UniPC's own, and what comes last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffplug.samplers.model_noise import Floats, NoiseLevels
from diffplug.samplers.schedule.grids import GRIDS
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.user_grid import checked_levels


@dataclass(frozen=True, eq=False)
class RunGrid:
    """sigmas [n + 1] of the nodes, as stored (in float32); times [n]: what the network is told there."""

    sigmas: Floats
    times: Floats

    def stored_times(self, flow: bool) -> torch.Tensor:
        """The times as a scheduler keeps them: int64 where all are whole, float32 otherwise and for flow."""
        whole = not flow and bool((self.times == np.round(self.times)).all())
        return torch.from_numpy(self.times.astype(np.int64 if whole else np.float32))


def given_grid(scheduler: Any, levels: NoiseLevels, timesteps: Any, sigmas: Any) -> RunGrid:
    """The nodes that a person gave, as one of the two, with the end of the scheduler's final_sigmas_type.

    Raises ValueError for what is not a grid, or lies below its own end already.
    """
    if sigmas is not None:
        nodes = checked_levels("sigmas", sigmas, lowest=0.0, highest=1.0 if levels.flow else np.inf)
        times = levels.time_of_sigma(nodes)
    else:
        lowest = np.finfo(np.float32).tiny if levels.flow else 0.0
        highest = levels.train_steps - (not levels.flow)
        times = checked_levels("timesteps", timesteps, lowest=lowest, highest=highest).astype(np.float64)
        nodes = times / levels.train_steps if levels.flow else levels.sigma_of_time(times)
    return rounded(np.append(nodes, _terminal(scheduler, levels, nodes)), times, levels)


def flow_grid(formula: str, levels: NoiseLevels, steps: int, lowest: float, final: str) -> RunGrid:
    """The nodes of a flow model by use_karras_sigmas and the like, from sigma 1 down to the lowest one."""
    name = formula.removeprefix("use_").removesuffix("_sigmas")
    levels = replace(levels, terminal=lowest)
    sigmas = GRIDS[name](steps, levels, final)
    return rounded(sigmas, levels.time_of_sigma(sigmas[:-1]), levels)


def schedule_grid(schedule: SolverSchedule, levels: NoiseLevels) -> RunGrid:
    """The nodes that a schedule asks for; with "unshifted" in its meta a flow model's shift is applied."""
    sigmas = schedule.nodes.sigmas(levels, len(schedule.steps))
    kind = schedule.nodes.kind
    if levels.flow and schedule.meta.get("unshifted") and kind != "name":
        sigmas = np.append(levels.shifted(sigmas[:-1]), sigmas[-1])
    given = kind == "timesteps"
    times = schedule.nodes.values[: len(sigmas) - 1] if given else levels.time_of_sigma(sigmas[:-1])
    return rounded(sigmas, times, levels)


def rounded(sigmas: Any, times: Any, levels: NoiseLevels) -> RunGrid:
    """A grid as the scheduler stores it; a flow network is told the time of the stored sigma."""
    stored = np.asarray(sigmas).astype(np.float32).astype(np.float64)
    return RunGrid(
        stored, levels.time_of_sigma(stored[:-1]) if levels.flow else np.asarray(times, np.float64)
    )


def check_apart(sigmas: torch.Tensor, spacing: str) -> None:
    """Raise ValueError where rounding has put two evaluations of Diffusers' grid at one noise level."""
    count = len(sigmas)
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"timestep_spacing={spacing!r} puts two of {count} steps at the same timestep: ask for fewer "
            f"steps, or for a grid by name, which does not round then (grid='linspace')"
        )


def _terminal(scheduler: Any, levels: NoiseLevels, nodes: Any) -> float:
    """The last node's sigma after a given grid. Raises ValueError when the grid already lies below it."""
    if scheduler.config.final_sigmas_type == "zero":
        return 0.0
    end = float(nodes[-1] if levels.flow else levels.sigma_min)
    if np.float32(nodes[-1]) <= end and not levels.flow:
        raise ValueError(
            f"the grid ends at sigma {nodes[-1]:g}, not above the terminal {end:g} of "
            f"final_sigmas_type='sigma_min': leave out its last node, or set final_sigmas_type='zero'"
        )
    return end
