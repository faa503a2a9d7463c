"""Known solvers on known grids: where a search begins, what it has to beat, and a winner made longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim, deis, dpmpp, ipndm, res_multistep, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.settings import SEED_GRIDS

__all__ = ["longer", "on_statistics", "other_grids", "preset_schedules", "stock_schedules"]

OTHER_GRIDS = ("karras", "log-snr", "beta57")
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
    """Return known solvers on known grids, by name, for a space's number of evaluations and its ends.

    Where the space has analytic first steps, each is there with one as well, and a step more.
    """
    found = _solvers(space, space.evaluations, grids)
    if space.analytic:
        more = _solvers(space, space.evaluations + 1, grids)
        first = space.firsts[-1]
        found |= {f"{k}, analytic": replace(v, first=first, mean=space.mean) for k, v in more.items()}
    return found


def on_statistics(space: ScheduleSpace, grids: Sequence[str] = SEED_GRIDS) -> list[SolverSchedule]:
    """Return three solvers on each grid that stand on the space's statistics (DPM-Solver-v3), if any."""
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
    """Return the presets of n steps."""
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


def stock_schedules(steps: int, nodes: Nodes) -> dict[str, SolverSchedule]:
    """Return Diffusers' multistep solvers on these nodes, and the strongest on other grids, by name."""
    found = {
        "DDIM": ddim(steps, nodes),
        "DPM-Solver++ 2M": dpmpp(steps, nodes),
        "DPM-Solver++ 3M": dpmpp(steps, nodes, order=3),
        "UniPC-2": unipc(steps, nodes),
        "UniPC-3": unipc(steps, nodes, order=3),
        "DEIS-2": deis(steps, nodes),
        "DEIS-3": deis(steps, nodes, order=3),
        "iPNDM": ipndm(steps, nodes),
        "res_multistep": res_multistep(steps, nodes),
    }
    for other in other_grids(nodes):
        found[f"DPM-Solver++ 2M, {other.name}"] = dpmpp(steps, other)
        found[f"UniPC-2, {other.name}"] = unipc(steps, other)
    return found


def other_grids(nodes: Nodes) -> list[Nodes]:
    """Return other grids with the same end."""
    final = "zero" if nodes.ends_clean else "sigma_min"
    return [Nodes(kind="name", name=name, final=final) for name in OTHER_GRIDS if name != nodes.name]


def longer(schedule: SolverSchedule, evaluations: int) -> SolverSchedule:
    """Return the schedule with so many evaluations: its longest step is cut in two, again and again.

    Nodes by name stay by name. Learned additions belong to one length and are left out.
    """
    found = replace(schedule, deltas=None, time_shift=None)
    while found.nfe < evaluations:
        lams = np.array(found.nodes.values if found.nodes.kind == "lambda" else [])
        gaps = np.diff(lams[np.isfinite(lams)])
        i = int(np.argmax(gaps)) if len(gaps) else max(0, len(found.steps) - 2)
        if len(gaps):
            middle = float(lams[i] + gaps[i] / 2)
            values = (*lams[: i + 1].tolist(), middle, *lams[i + 1 :].tolist())
            nodes = Nodes(kind="lambda", values=values)
        else:
            nodes = found.nodes
        steps = (*found.steps[: i + 1], *found.steps[i:])
        found = replace(found, nodes=nodes, steps=steps)
    return found
