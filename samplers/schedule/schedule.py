"""SolverSchedule: every decision of one sampler, as a value that can be written, shared and checked.

A schedule says what to do and holds for any model it is compiled for (`samplers.solver.table`); numbers are
made there. Format: methods of arXiv 2312.07243, with the compensation of arXiv 2409.03755 and learned rows.

As JSON (format "solver-schedule", version 1):

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

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffplug.checks import as_list, as_numbers, as_object, check_keys, finite, numbered, whole
from diffplug.files import read_json, write_json
from diffplug.messages import reason, shown
from diffplug.samplers.schedule.nodes import Nodes, _grid, _grid_to_json
from diffplug.samplers.schedule.steps import (
    MAX_DC_ORDER,
    MOST_STEPS,
    Delta,
    SolverStep,
    _delta,
    _step,
    _step_to_json,
)

FIRST = ("model", "zero_x0", "mean")
COMPENSATION_VARIABLES = ("timestep", "lambda")


@dataclass(frozen=True, kw_only=True)
class SolverSchedule:
    """The decisions of a sampler of N steps.

    nodes: where the network is evaluated. steps: N decisions, in order. first: "model" evaluates the network
    at node 0; "zero_x0" and "mean" take the noise for the prediction there, or the mean of the data (mean:
    one number, or one for each channel), which saves that evaluation. compensation: (K, variable) of the
    steps' ratios: the last K + 1 outputs, over "timestep" or "lambda". deltas: learned additions to each
    step's row, None for none. time_shift: for each evaluation by node, what is added to the timestep that the
    network is told. skips: U-Net skip coefficients; they change the model, so that the plug
    `Solver` applies them, and a `SolverScheduler` alone cannot. statistics: path of the model's statistics
    (`ModelStatistics`), which "ems" steps need; a saved schedule names a file in its own folder without the
    folder. meta: where the schedule came from (model, steps, guidance, metric), JSON.

    Raises ValueError, with the number of the step where there is one, for what is no valid solver.
    """

    nodes: Nodes
    steps: tuple[SolverStep, ...]
    first: str = "model"
    mean: tuple[float, ...] | None = None
    compensation: tuple[int, str] = (2, "timestep")
    deltas: tuple[Delta | None, ...] | None = None
    time_shift: tuple[float, ...] | None = None
    skips: tuple[float, ...] | None = None
    statistics: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "compensation", tuple(self.compensation))
        object.__setattr__(self, "meta", MappingProxyType(_json_copy(self.meta)))
        if len(self.steps) > MOST_STEPS:
            raise ValueError(f"the schedule has {len(self.steps)} steps, allowed are up to {MOST_STEPS}")
        if not self.steps:
            raise ValueError("the schedule has no steps: give one decision for each step")
        self.nodes.check_count(len(self.steps))
        self._check_first()
        self._check_compensation()
        for index, step in enumerate(self.steps):
            try:
                self._check_step(index, step)
            except ValueError as error:
                raise ValueError(f"step {index}: {error}") from None
        self._check_extras()

    def _check_first(self) -> None:
        if self.first not in FIRST:
            raise ValueError(f"first {shown(self.first)} is unknown: allowed are {', '.join(FIRST)}")
        if (self.mean is not None) != (self.first == "mean"):
            raise ValueError("mean holds the data's mean for first='mean', and is left out otherwise")
        if self.mean is not None:
            object.__setattr__(self, "mean", tuple(finite("mean", value) for value in self.mean))
            if not self.mean:
                raise ValueError("mean is empty: give one number, or one for each channel")
        if self.first != "model" and len(self.steps) == 1:
            raise ValueError(f"first {self.first!r} leaves a schedule of one step without any evaluation")

    def _check_compensation(self) -> None:
        order, variable = self.compensation
        whole("the compensation's order", order, 1, MAX_DC_ORDER)
        if variable not in COMPENSATION_VARIABLES:
            raise ValueError(
                f"compensation over {shown(variable)}: allowed are {' and '.join(COMPENSATION_VARIABLES)}"
            )

    def _check_step(self, index: int, step: SolverStep) -> None:
        step.check_place(index, len(self.steps))
        order = self.compensation[0]
        if step.ratio != 1 and index < order:
            raise ValueError(f"ratio {step.ratio:g} can do nothing: order {order} needs {order + 1} outputs")
        last = index == len(self.steps) - 1
        by_index = step.predict.variable == "index" and step.param == "noise"
        if last and self.nodes.ends_clean and step.predict.order > 1 and not by_index:
            raise ValueError(
                f"order {step.predict.order} cannot end at sigma 0, where lambda is infinite: use 1"
            )
        if last and self.nodes.ends_clean and step.param not in ("data", "noise"):
            raise ValueError("a step to sigma 0 takes param 'data' or 'noise'")

    def _check_extras(self) -> None:
        steps = len(self.steps)
        if self.deltas is not None:
            object.__setattr__(self, "deltas", tuple(self.deltas))
            _check_length("deltas", self.deltas, steps)
            for index, delta in enumerate(self.deltas):
                if delta is not None and delta.reach > index + 1:
                    raise ValueError(
                        f"step {index}: its delta looks at {delta.reach} evaluations, {index + 1} exist"
                    )
        for name, low in (("time_shift", -float("inf")), ("skips", 0.0)):
            numbers = getattr(self, name)
            if numbers is not None:
                checked = tuple(finite(name, value) for value in numbers)
                object.__setattr__(self, name, checked)
                if name == "skips" and not all(low <= value <= 1 for value in checked):
                    raise ValueError(f"skips have to lie between 0 and 1, got {list(checked)}")
        if self.time_shift is not None:
            _check_length("time_shift", self.time_shift, steps)
        if self.statistics is not None and not (isinstance(self.statistics, str) and self.statistics):
            raise ValueError(f"statistics is {shown(self.statistics)}: give the path of a file, or None")

    @property
    def nfe(self) -> int:
        """How often the network is evaluated: once for each step, less an analytic first one."""
        return len(self.steps) - (self.first != "model")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The compensation ratio of every step."""
        return tuple(step.ratio for step in self.steps)

    @property
    def needs_statistics(self) -> bool:
        """Whether a step stands on the model's statistics."""
        return any(step.param == "ems" for step in self.steps)

    def __deepcopy__(self, memo: Any) -> SolverSchedule:
        return self

    def __reduce__(self) -> Any:
        return type(self).from_json, (self.to_json(),)

    def with_nodes(self, nodes: Nodes) -> SolverSchedule:
        """The same decisions on other nodes."""
        return replace(self, nodes=nodes)

    def to_json(self) -> dict[str, Any]:
        """The schedule as plain JSON values; `from_json` gives it back equal."""
        from diffplug.samplers.schedule.schedule import schedule_to_json

        return schedule_to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> SolverSchedule:
        """The schedule of a JSON document (an object, or its text); ValueError for what is none.

        Refuses unknown keys and files of a newer version.
        """
        from diffplug.samplers.schedule.schedule import schedule_from_json

        return schedule_from_json(_parsed(document) if isinstance(document, str) else document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as a JSON file, whole or not at all; raises diffplug.files.WriteError."""
        found, folder = self, Path(path).absolute().parent
        if self.statistics is not None and Path(self.statistics).absolute().parent == folder:
            found = replace(self, statistics=Path(self.statistics).name)
        write_json(path, found.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverSchedule:
        """The schedule in a JSON file; ValueError names the file where it holds none."""
        document = read_json(path, limit=LARGEST_FILE)
        try:
            found = cls.from_json(document)
            if found.statistics is None:
                return found
            return replace(found, statistics=str(Path(path).absolute().parent / found.statistics))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is no solver schedule: {error}") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the text of a solver schedule is not valid JSON: {reason(error)}") from None


def _check_length(name: str, values: Any, steps: int) -> None:
    if len(values) != steps:
        raise ValueError(f"{name} has {len(values)} entries for {steps} steps: give one for each")


def _json_copy(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of what JSON can hold; ValueError for anything else."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"meta has to be plain JSON: {reason(error)}") from None
    return copied


FORMAT = "solver-schedule"
LARGEST_FILE = 2**20  # bytes; hundreds of steps fit in well


VERSION = 1


_TOP = (
    *("format", "version", "nfe", "grid", "first", "mean", "steps"),
    *("compensation", "deltas", "time_shift", "skips", "statistics", "meta"),
)


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


def schedule_from_json(document: Any) -> SolverSchedule:
    """The schedule of a JSON object; ValueError says what is wrong, and in which step."""
    _check_head(document)
    check_keys("solver schedule", document, _TOP)
    steps = [numbered(i, _step, each) for i, each in enumerate(as_list("steps", document.get("steps")))]
    compensation = as_object("compensation", document.get("compensation", {}))
    check_keys("compensation", compensation, ("order", "variable"))
    deltas = document.get("deltas")
    schedule = SolverSchedule(
        nodes=_grid(as_object("grid", document.get("grid"))),
        steps=tuple(steps),
        first=document.get("first", "model"),
        mean=as_numbers("mean", document.get("mean")),
        compensation=(compensation.get("order", 2), compensation.get("variable", "timestep")),
        deltas=None
        if deltas is None
        else tuple(numbered(i, _delta, each) for i, each in enumerate(as_list("deltas", deltas))),
        time_shift=as_numbers("time_shift", document.get("time_shift")),
        skips=as_numbers("skips", document.get("skips")),
        statistics=document.get("statistics"),
        meta=as_object("meta", document.get("meta", {})),
    )
    if document.get("nfe", schedule.nfe) != schedule.nfe:
        raise ValueError(f"nfe says {shown(document['nfe'])} evaluations, the steps take {schedule.nfe}")
    return schedule


def _check_head(document: Any) -> None:
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise ValueError(f"this is no solver schedule: its 'format' has to be {FORMAT!r}")
    version = document.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version {shown(version)} of a solver schedule does not exist: known is {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"the schedule has version {shown(version)}, this diffplug reads up to {VERSION}: update diffplug"
        )
