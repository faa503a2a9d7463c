"""The search space: every setting is a solver, presets have their place in it, changes keep it valid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import deis, dpmpp, res_multistep, unipc
from diffplug.samplers.search.decisions.evolution import crossed, mutated, random_values
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.solver.compile import compile_schedule

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))
FLOW = NoiseLevels.from_scheduler(
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
)


def space(
    evaluations: int = 5, *, flow: bool = False, final: str = "sigma_min", **more: Any
) -> ScheduleSpace:
    nodes = Nodes(kind="name", name="linspace", final="zero" if flow else final)
    return ScheduleSpace(evaluations, FLOW if flow else VP, nodes, **more)


SPACES = [
    space(5),
    space(4, analytic=True),
    space(1),
    space(6, final="zero"),
    space(3, final="zero", analytic=True),
    space(5, flow=True),
    space(5, starts=2),
    space(4, analytic=True, mean=(0.1, 0.2)),
]


@pytest.mark.law
@given(st.sampled_from(SPACES), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_every_setting_is_a_solver_that_compiles(where: ScheduleSpace, seed: int) -> None:
    values = random_values(where, np.random.default_rng(seed))
    schedule = where.schedule(values)
    table = compile_schedule(schedule, where.levels)
    assert schedule.nfe == where.evaluations
    assert all(np.isfinite(term.weight) for step in table.steps for row in step.rows for term in row)


@pytest.mark.law
@pytest.mark.parametrize("where", SPACES, ids=range(len(SPACES)))
def test_changes_and_crossings_stay_valid(where: ScheduleSpace) -> None:
    rng = np.random.default_rng(0)
    one, two = random_values(where, rng), random_values(where, rng)
    for _ in range(300):
        child = mutated(where, crossed(where, one, two, rng), rng)
        where.schedule(child)
        assert set(child) == {dimension.name for dimension in where.dimensions}
        one, two = two, child


@pytest.mark.law
@pytest.mark.parametrize(
    "preset",
    [
        res_multistep,
        lambda n, nodes: deis(n, nodes, order=3),
        lambda n, nodes: dpmpp(n, nodes, order=1),
        lambda n, nodes: res_multistep(n, Nodes(kind="name", name="karras", final=nodes.final)),
    ],
    ids=["res", "deis-3", "ddim", "res on karras"],
)
def test_presets_without_named_relaxations_are_in_the_space(preset: Any) -> None:
    where = space(6)
    schedule = preset(6, where.nodes)
    again = where.schedule(where.values(schedule))
    ours, theirs = (compile_schedule(each, VP) for each in (again, schedule))
    assert np.allclose(ours.sigmas, theirs.sigmas, rtol=1e-9)
    for one, two in zip(ours.steps, theirs.steps, strict=True):
        assert np.allclose([t.weight for t in one.predict], [t.weight for t in two.predict], rtol=1e-6)


@pytest.mark.law
def test_named_relaxations_come_near() -> None:
    where = space(6)
    for schedule in (dpmpp(6, where.nodes), unipc(6, where.nodes), unipc(6, where.nodes, kind="bh1")):
        again = where.schedule(where.values(schedule))
        assert [s.correct is None for s in again.steps] == [s.correct is None for s in schedule.steps]
        assert [s.predict.order for s in again.steps] == [s.predict.order for s in schedule.steps]
        ours, theirs = (compile_schedule(each, VP) for each in (again, schedule))
        for one, two in zip(ours.steps, theirs.steps, strict=True):
            assert np.allclose([t.weight for t in one.predict], [t.weight for t in two.predict], atol=0.2)


def test_an_analytic_first_step_buys_a_step() -> None:
    where = space(4, analytic=True)
    values = random_values(where, np.random.default_rng(1))
    assert len(where.schedule({**values, "first": "zero_x0"}).steps) == 5
    assert len(where.schedule({**values, "first": "model"}).steps) == 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the values lack gap_0"):
        space(5).schedule({})
    with pytest.raises(ValueError, match="has 6 evaluations, the space 5"):
        space(5).values(dpmpp(6))


@pytest.mark.law
def test_steps_that_start_earlier_use_the_newest_evaluations_first() -> None:
    where = space(4, starts=2)
    values = {d.name: 0.0 if d.real else d.choices[0] for d in where.dimensions}
    schedule = where.schedule({**values, "order_3": 4, "back_3": 2, "order_2": 3, "back_2": 1, "back_0": 2})
    starts = [step.predict.start for step in schedule.steps]
    points = [[list(d.points) for d in step.predict.derivatives] for step in schedule.steps]
    assert starts == [0, 0, -1, -2] and points[2] == [[1, -1]] * 2 and points[3] == [[2, 1, -1]] * 3
    assert where.values(schedule)["back_3"] == 2
    plain = space(4).schedule({**values, "order_3": 4})
    assert [list(d.points) for d in plain.steps[3].predict.derivatives] == [[-1, -2, -3]] * 3


@pytest.mark.law
def test_the_mean_of_the_data_stands_for_the_first_evaluation() -> None:
    where = space(4, analytic=True, mean=(0.1, 0.2))
    values = {d.name: 0.0 if d.real else d.choices[0] for d in where.dimensions}
    found = where.schedule({**values, "first": "mean"})
    assert found.first == "mean" and found.mean == (0.1, 0.2) and len(found.steps) == 5 and found.nfe == 4
    assert where.values(found)["first"] == "mean" and where.schedule(values).mean is None
    with pytest.raises(ValueError, match="mean is for analytic first steps: set analytic=True"):
        space(4, mean=(0.1,))
