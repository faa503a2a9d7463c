"""SolverSchedule to JSON and back: format "solver-schedule", version 1.

    {"format": "solver-schedule", "version": 1, "nfe": 2,
     "grid": {"lambda": [-2.6, 0.4, "inf"], "final": "node"},        or "timesteps", "sigmas", "name"
     "first": "model",
     "steps": [{"param": "data", "order": 1},
               {"param": {"l": 0.7, "s": -0.3}, "start": 0, "order": 2, "ratio": 1.0,
                "d": [{"points": [-1], "scale": {"kind": "linear", "c": 0.05}}],
                "correct": {"order": 3, "d": [{"points": [1, -1]}, {"points": [1, -1]}]}}],
     "compensation": {"order": 2, "variable": "timestep"},
     "deltas": null, "time_shift": null, "skips": null, "statistics": null, "meta": {}}

What is left out takes its default; a missing "d" means every earlier point for each derivative, unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffplug.registry import unknown
from diffplug.samplers.decisions import Delta, Derivative, Linear, Scale, SolverStep, Update
from diffplug.samplers.nodes import KINDS, Nodes
from diffplug.samplers.schedule import SolverSchedule

FORMAT = "solver-schedule"
VERSION = 1

_TOP = (
    *("format", "version", "nfe", "grid", "first", "mean", "steps"),
    *("compensation", "deltas", "time_shift", "skips", "statistics", "meta"),
)
_STEP = ("param", "start", "order", "d", "variable", "ratio", "correct")


def schedule_to_json(schedule: SolverSchedule) -> dict[str, Any]:
    """Plain JSON values of a schedule."""
    order, variable = schedule.compensation
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "nfe": schedule.nfe,
        "grid": _grid_to_json(schedule.nodes),
        "first": schedule.first,
        "steps": [_step_to_json(step) for step in schedule.steps],
        "compensation": {"order": order, "variable": variable},
    }
    if schedule.deltas is not None:
        document["deltas"] = [
            None if delta is None else {"data": list(delta.data), "states": list(delta.states)}
            for delta in schedule.deltas
        ]
    for name in ("mean", "time_shift", "skips"):
        if getattr(schedule, name) is not None:
            document[name] = list(getattr(schedule, name))
    if schedule.statistics is not None:
        document["statistics"] = schedule.statistics
    return {**document, "meta": dict(schedule.meta)}


def _grid_to_json(nodes: Nodes) -> dict[str, Any]:
    if nodes.kind == "name":
        return {"name": nodes.name, "final": nodes.final}
    values = ["inf" if value == math.inf else value for value in nodes.values]
    return {nodes.kind: values, "final": nodes.final}


def _step_to_json(step: SolverStep) -> dict[str, Any]:
    param = step.param if isinstance(step.param, str) else {"l": step.param.l, "s": step.param.s}
    document = {"param": param, **_update_to_json(step.predict)}
    if step.ratio != 1:
        document["ratio"] = step.ratio
    document["correct"] = None if step.correct is None else _update_to_json(step.correct)
    return document


def _update_to_json(update: Update) -> dict[str, Any]:
    document: dict[str, Any] = {"start": update.start, "order": update.order}
    document["d"] = [
        {"points": list(d.points), "scale": {"kind": d.scale.kind, "c": d.scale.c}}
        for d in update.derivatives
    ]
    if update.variable != "lambda":
        document["variable"] = update.variable
    return document


def schedule_from_json(document: Any) -> SolverSchedule:
    """The schedule of a JSON object; ValueError says what is wrong, and in which step."""
    _check_head(document)
    _check_keys("solver schedule", document, _TOP)
    steps = [_numbered(i, _step, each) for i, each in enumerate(_list("steps", document.get("steps")))]
    compensation = _object("compensation", document.get("compensation", {}))
    _check_keys("compensation", compensation, ("order", "variable"))
    deltas = document.get("deltas")
    schedule = SolverSchedule(
        nodes=_grid(_object("grid", document.get("grid"))),
        steps=tuple(steps),
        first=document.get("first", "model"),
        mean=_numbers("mean", document.get("mean")),
        compensation=(compensation.get("order", 2), compensation.get("variable", "timestep")),
        deltas=None
        if deltas is None
        else tuple(_numbered(i, _delta, each) for i, each in enumerate(_list("deltas", deltas))),
        time_shift=_numbers("time_shift", document.get("time_shift")),
        skips=_numbers("skips", document.get("skips")),
        statistics=document.get("statistics"),
        meta=_object("meta", document.get("meta", {})),
    )
    if document.get("nfe", schedule.nfe) != schedule.nfe:
        raise ValueError(f"nfe says {document['nfe']!r} evaluations, the steps take {schedule.nfe}")
    return schedule


def _check_head(document: Any) -> None:
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise ValueError(f"this is no solver schedule: its 'format' has to be {FORMAT!r}")
    version = document.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version {version!r} of a solver schedule does not exist: known is {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"the schedule has version {version}, this diffplug reads up to {VERSION}: update diffplug"
        )


def _grid(document: Mapping[str, Any]) -> Nodes:
    kinds = [kind for kind in KINDS if kind in document]
    _check_keys("grid", document, (*KINDS, "final"))
    if len(kinds) != 1:
        raise ValueError(f"a grid has exactly one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    kind = kinds[0]
    if kind == "name":
        return Nodes(kind="name", name=str(document["name"]), final=document.get("final", "zero"))
    values = [math.inf if value == "inf" else value for value in _list(kind, document[kind])]
    return Nodes(kind=kind, values=tuple(values), final=document.get("final", "node"))


def _step(document: Any) -> SolverStep:
    document = _object("a step", document)
    _check_keys("step", document, _STEP)
    param, correct = document.get("param", "data"), document.get("correct")
    if isinstance(param, Mapping):
        _check_keys("param", param, ("l", "s"))
        param = Linear(param.get("l"), param.get("s"))  # type: ignore[arg-type]
    return SolverStep(
        param=param,
        predict=_update({k: v for k, v in document.items() if k in ("start", "order", "d", "variable")}, -1),
        correct=None if correct is None else _update(_object("correct", correct), 1),
        ratio=document.get("ratio", 1.0),
    )


def _update(document: Mapping[str, Any], newest: int) -> Update:
    """An update; newest: 1 where the new evaluation is among the points by default, -1 where it is not."""
    _check_keys("update", document, ("start", "order", "d", "variable"))
    order = document.get("order", 1)
    derivatives = document.get("d")
    if derivatives is None and isinstance(order, int) and order > 1:
        points = list(range(-1, -order, -1)) if newest < 0 else [1, *range(-1, 1 - order, -1)]
        derivatives = [{"points": points}] * (order - 1)
    return Update(
        order=order,
        derivatives=tuple(_derivative(each) for each in _list("d", derivatives or [])),
        start=document.get("start", 0),
        variable=document.get("variable", "lambda"),
    )


def _derivative(document: Any) -> Derivative:
    document = _object("a derivative", document)
    _check_keys("derivative", document, ("points", "scale"))
    scale = _object("scale", document.get("scale", {}))
    _check_keys("scale", scale, ("kind", "c"))
    points = tuple(_list("points", document.get("points")))
    return Derivative(points, Scale(scale.get("kind", "none"), scale.get("c", 0.0)))


def _delta(document: Any) -> Delta | None:
    if document is None:
        return None
    _check_keys("delta", _object("a delta", document), ("data", "states"))
    data, states = _numbers("data", document.get("data")), _numbers("states", document.get("states"))
    return Delta(data or (), states or ())


def _numbered(index: int, read: Any, document: Any) -> Any:
    try:
        return read(document)
    except ValueError as error:
        raise ValueError(f"step {index}: {error}") from None


def _check_keys(what: str, document: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in document:
        if key not in known:
            raise unknown(f"key of a {what}", key, list(known))


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has to be a JSON object, got {value!r}")
    return value


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name} has to be a list, got {value!r}")
    return value


def _numbers(name: str, value: Any) -> tuple[Any, ...] | None:
    return None if value is None else tuple(_list(name, value))
