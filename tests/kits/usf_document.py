"""A schedule in the layout of the files that thu-nics/USF released."""

from __future__ import annotations

from typing import Any

import torch

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Scale, Update

FIRST = {"model": "no_afs", "zero_x0": "zero_x0", "mean": "average_x0"}
PARAM = {"noise": "noise_prediction", "data": "data_prediction", "ems": "dpmsolver_v3_prediction"}
NONE = {"type": "no_corrector", "start_point": None, "taylor_order": None, "derivative_type": None}


def derivatives(update: Update, start: int) -> list[dict[str, Any]]:
    found = []
    for each in update.derivatives:
        points = sorted(point + start for point in each.points)
        entry: dict[str, Any] = {"estimate": f"Difference_{len(points)}", "active_points": points}
        entry |= {"relaxation": None}
        if each.scale != Scale():
            entry |= {"relaxation": each.scale.kind, "relaxation_coefficient": each.scale.c}
        found.append(entry)
    return found


def document(schedule: SolverSchedule, times: list[float]) -> dict[str, Any]:
    """A schedule as the released files have it."""
    correctors = [
        NONE
        if step.correct is None
        else {
            "type": "pseudo",
            "start_point": -2,
            "taylor_order": step.correct.order,
            "derivative_type": derivatives(step.correct, -2),
        }
        for step in schedule.steps
    ]
    return {
        "timesteps": torch.tensor(times, dtype=torch.float64),
        "orders": [step.predict.order for step in schedule.steps],
        "prediction_types": [PARAM[str(step.param)] for step in schedule.steps],
        "start_points": [-1] * len(schedule.steps),
        "derivative_types": [derivatives(step.predict, -1) for step in schedule.steps],
        "corrector_types": correctors,
        "afs": FIRST[schedule.first],
        "skip_coefficients": torch.tensor([0.9, 1.0]),
    }
