"""SolverSchedule: what is no solver is refused with the step's number; files give back what went in."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta, Derivative, Linear, Scale, SolverStep, Update

NAN, INF = float("nan"), float("inf")


def document(**changes: Any) -> dict[str, Any]:
    """A small valid document, with changes at the top."""
    return {
        "format": "solver-schedule",
        "version": 1,
        "grid": {"lambda": [-2.6, -0.5, 1.0, 3.0]},
        "steps": [{"order": 1}, {"order": 2}, {"param": "noise", "order": 2, "ratio": 1.1}],
        **changes,
    }


def with_step(index: int, **step: Any) -> dict[str, Any]:
    base = document()
    base["steps"] = [*base["steps"]]
    base["steps"][index] = step
    return base


@pytest.mark.law
def test_defaults_are_filled_in() -> None:
    schedule = SolverSchedule.from_json(document())
    assert schedule.nfe == 3 and schedule.first == "model" and schedule.compensation == (2, "timestep")
    assert schedule.steps[1].predict == Update(order=2, derivatives=(Derivative((-1,)),))
    assert schedule.ratios == (1.0, 1.0, 1.1)
    corrected = SolverSchedule.from_json(with_step(1, order=2, correct={"order": 3}))
    assert corrected.steps[1].correct == Update(
        order=3, derivatives=(Derivative((1, -1)), Derivative((1, -1)))
    )


@pytest.mark.law
@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([1], "no solver schedule"),
        ({"format": "other"}, "'format' has to be"),
        (document(version=2), "version 2, this diffplug reads up to 1: update"),
        (document(version=0), "version 0 of a solver schedule does not exist"),
        (document(stepps=[]), r"unknown key of a solver schedule 'stepps'. Did you mean 'steps'"),
        (document(steps=[]), "no steps"),
        (document(steps="123"), "steps has to be a list"),
        (document(nfe=4), "nfe says 4 evaluations, the steps take 3"),
        (document(grid=[1, 2]), "grid has to be a JSON object"),
        (document(grid={"lambda": [0, 1, 2]}), "3 steps with final 'node' need 4 nodes, there are 3"),
        (document(grid={"lambda": [0, 1, 1, 2]}), "step 1: lambda go from 1 to 1, they have to increase"),
        (document(grid={"lambda": [0, 1, NAN, 2]}), "node 2 of the grid is nan"),
        (document(grid={"lambda": [0, "inf", 1, 2]}), "node 1 of the grid is inf"),
        (document(grid={"sigmas": [5, 6, 1, 0]}), "step 0: sigmas go from 5 to 6, they have to decrease"),
        (document(grid={"sigmas": [9, 5, 1, INF]}), "node 3 of the grid is inf"),
        (document(grid={"sigmas": [5, 1, 0], "final": "zero"}), "leave the final 0"),
        (document(grid={"timesteps": [999, 999, 1, 0]}), "step 0: timesteps"),
        (document(grid={"timesteps": [9, 5, 1, -2]}), "too small"),
        (document(grid={"lambda": [0, 1, 2, 3], "final": "one"}), "final 'one'"),
        (document(grid={"name": "karas"}), "Did you mean 'karras'"),
        (document(grid={"lambda": [0], "sigmas": [1]}), "exactly one of"),
        (document(first="zero"), "first 'zero' is unknown"),
        (document(first="mean"), "mean holds the data's mean"),
        (document(compensation={"order": 9}), "compensation's order is 9"),
        (document(compensation={"variable": "sigma"}), "compensation over 'sigma'"),
        (document(deltas=[None]), "deltas has 1 entries for 3 steps"),
        (
            document(deltas=[{"data": [1, 2]}, None, None]),
            "step 0: its delta looks at 2 evaluations, 1 exist",
        ),
        (document(deltas=[{"data": [NAN]}, None, None]), "step 0: data delta is nan"),
        (document(skips=[1.5]), "skips have to lie between 0 and 1"),
        (document(time_shift=[0, 0]), "time_shift has 2 entries"),
        (document(meta=[]), "meta has to be a JSON object"),
        (with_step(0, order=2), "step 0: the predictor uses point -1 from start 0"),
        (with_step(0, order=1, ratio=1.2), "step 0: ratio 1.2 can do nothing"),
        (with_step(1, order=1.5), "step 1: order is 1.5"),
        (with_step(1, order=7), "step 1: order is 7"),
        (with_step(1, order=True), "step 1: order is True"),
        (with_step(1, order=3, d=[{"points": [-1]}]), "step 1: order 3 needs 2 derivatives, got 1"),
        (with_step(2, order=3, d=[{"points": [-1]}, {"points": [-2]}]), "step 2: derivative 2 needs"),
        (with_step(1, order=2, d=[{"points": [0]}]), "step 1: points"),
        (with_step(1, order=2, d=[{"points": [1]}]), "step 1: the predictor uses point 1"),
        (with_step(2, order=2, d=[{"points": [-1, -1]}]), "step 2: points"),
        (with_step(1, start=-2), "step 1: the predictor starts 2 nodes back"),
        (with_step(1, start=1), "step 1: start is 1"),
        (with_step(1, param="score"), "step 1: param 'score' is unknown"),
        (with_step(1, param={"l": NAN, "s": 0}), "step 1: l is nan"),
        (with_step(1, param={"l": 1}), "step 1: s is None"),
        (with_step(1, order=2, d=[{"points": [-1], "scale": {"kind": "bh3"}}]), "step 1: scale 'bh3'"),
        (with_step(1, order=2, d=[{"points": [-1], "scale": {"kind": "bh1", "c": 2}}]), "takes no c"),
        (with_step(1, correct={"order": 2, "d": [{"points": [-1]}]}), "step 1: the corrector does not use"),
        (with_step(2, correct={"order": 2}), "step 2: the last step has a corrector"),
        (with_step(1, oder=2), "step 1: unknown key of a step 'oder'. Did you mean 'order'"),
        (with_step(2, ratio=INF), "step 2: ratio is inf"),
        (document(grid={"lambda": [0, 1, 2, "inf"]}), "step 2: order 2 cannot end at sigma 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_solver_is_refused(bad: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        SolverSchedule.from_json(bad)
    assert "\n" not in str(caught.value)


numbers = st.floats(-3, 3, allow_nan=False)
scales = st.builds(Scale, st.sampled_from(["const", "linear", "exp"]), numbers) | st.sampled_from(
    [Scale(), Scale("bh1"), Scale("bh2")]
)
params = st.sampled_from(["data", "noise", "ems"]) | st.builds(Linear, numbers, numbers)


@st.composite
def schedules(draw: Any) -> SolverSchedule:
    """Any valid schedule of up to six steps."""
    count = draw(st.integers(2, 6))
    steps = []
    for i in range(count):
        order = draw(st.integers(1, i + 1))
        points = st.permutations(range(-1, -order, -1))
        groups = [Derivative(tuple(draw(points)), draw(scales)) for _ in range(order - 1)]
        predict = Update(
            order=order, derivatives=tuple(groups), variable=draw(st.sampled_from(["lambda", "index"]))
        )
        correct = None
        if i < count - 1 and draw(st.booleans()):
            correct = Update(order=2, derivatives=(Derivative((1,), draw(scales)),))
        ratio = draw(st.just(1.0) | numbers) if i >= 2 else 1.0
        steps.append(SolverStep(param=draw(params), predict=predict, correct=correct, ratio=ratio))
    gaps = draw(st.lists(st.floats(0.05, 2), min_size=count, max_size=count))
    lambdas = [-3.0 + sum(gaps[:i]) for i in range(count + 1)]
    deltas = tuple(
        draw(st.none() | st.builds(Delta, st.tuples(numbers), st.tuples(numbers))) for _ in range(count)
    )
    return SolverSchedule(
        nodes=Nodes(kind="lambda", values=tuple(lambdas)),
        steps=tuple(steps),
        first=draw(st.sampled_from(["model", "zero_x0"])),
        deltas=draw(st.none() | st.just(deltas)),
        time_shift=draw(st.none() | st.just(tuple(gaps))),
        meta={"model": "toy", "guidance_scale": 7.5},
    )


@pytest.mark.law
@given(schedules())
def test_json_gives_back_what_went_in(schedule: SolverSchedule) -> None:
    text = json.dumps(schedule.to_json(), allow_nan=False)
    assert SolverSchedule.from_json(text) == schedule
    assert SolverSchedule.from_json(json.loads(text)).to_json() == schedule.to_json()
    assert pickle.loads(pickle.dumps(schedule)) == schedule  # noqa: S301 - our own bytes
    assert copy.deepcopy(schedule) == schedule


@pytest.mark.law
@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_survive_a_file(name: str, tmp_path: Path) -> None:
    schedule = presets.preset(name)(5, "ays-sd")
    schedule.save(tmp_path / "five.json")
    assert SolverSchedule.load(tmp_path / "five.json") == schedule


@pytest.mark.law
def test_an_infinite_end_is_written_as_a_word(tmp_path: Path) -> None:
    nodes = Nodes(kind="lambda", values=(-2.0, 1.0, math.inf))
    schedule = SolverSchedule(nodes=nodes, steps=(SolverStep(), SolverStep()))
    assert schedule.to_json()["grid"]["lambda"][-1] == "inf"
    schedule.save(tmp_path / "clean.json")
    assert SolverSchedule.load(tmp_path / "clean.json") == schedule


@pytest.mark.law
def test_a_bad_file_is_named_and_a_good_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(document(version=7)))
    with pytest.raises(ValueError, match=r"schedule.json' is no solver schedule: .*update diffplug"):
        SolverSchedule.load(path)
    path.write_text('{"format": "solver-schedule", "version"')
    with pytest.raises(ValueError, match="is not valid JSON"):
        SolverSchedule.load(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="plain JSON"):
        replace(presets.ddim(3), meta={"model": object()}).save(path)
    assert path.read_bytes() == before


@pytest.mark.law
def test_schedules_are_frozen() -> None:
    meta = {"model": "toy", "history": [1]}
    schedule = replace(presets.ddim(3), meta=meta)
    meta["history"].append(2)  # type: ignore[attr-defined]
    assert schedule.meta["history"] == [1]
    with pytest.raises(FrozenInstanceError):
        schedule.first = "mean"  # type: ignore[misc]
    with pytest.raises(TypeError):
        schedule.meta["model"] = "other"  # type: ignore[index]
