"""Known solvers on known grids: where a search over schedules begins, and what it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim, deis, dpmpp, res_multistep, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.space import ScheduleSpace

__all__ = ["SEED_GRIDS", "on_statistics", "preset_schedules"]

SEED_GRIDS = ("linspace", "trailing", "karras", "log-snr", "beta57", "exponential")
SOLVERS: dict[str, Callable[[int, Nodes], SolverSchedule]] = {
    "DDIM": ddim,
    "DPM-Solver++ 2M": dpmpp,
    "res_multistep": res_multistep,
    "DPM-Solver++ 3M": partial(dpmpp, order=3, true_third=True),
    "UniPC-2": unipc,
    "UniPC-3": partial(unipc, order=3),
    "DEIS-2": deis,
    "DEIS-3": partial(deis, order=3),
}


def preset_schedules(space: ScheduleSpace, grids: Sequence[str] = SEED_GRIDS) -> dict[str, SolverSchedule]:
    """Known solvers on known grids, by name, for a space's number of evaluations and its ends.

    Where the space has analytic first steps, each is there with one as well, and a step more.
    """
    found = _solvers(space, space.evaluations, grids)
    if space.analytic:
        more = _solvers(space, space.evaluations + 1, grids)
        first = space.firsts[-1]
        found |= {f"{k}, analytic": replace(v, first=first, mean=space.mean) for k, v in more.items()}
    return found


def on_statistics(space: ScheduleSpace, grids: Sequence[str] = SEED_GRIDS) -> list[SolverSchedule]:
    """Three solvers on each grid that stand on the space's statistics (DPM-Solver-v3); none without them."""
    if space.statistics is None:
        return []
    found = []
    for name, schedule in _solvers(space, space.evaluations, grids).items():
        if name.partition(",")[0] in ("DDIM", "UniPC-2", "UniPC-3"):
            last = len(schedule.steps) - schedule.nodes.ends_clean
            steps = (replace(s, param="ems" if i < last else s.param) for i, s in enumerate(schedule.steps))
            found.append(replace(schedule, steps=tuple(steps), statistics=space.statistics))
    return found


def _solvers(space: ScheduleSpace, n: int, grids: Sequence[str]) -> dict[str, SolverSchedule]:
    """The presets of n steps."""
    final = "zero" if space.nodes.ends_clean else "sigma_min"
    found: dict[str, SolverSchedule] = {}
    for name in grids:
        grid = Nodes(kind="name", name=name, final=final)  # refuses unknown names
        try:
            grid.sigmas(space.levels, n)
        except ValueError:
            continue  # a grid that does not exist for this model or number of steps
        for solver, make in SOLVERS.items():
            found[f"{solver}, {name}"] = make(n, grid)
    return found
