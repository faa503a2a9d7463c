"""Schedules that a search has found run as they are; analytic first steps save an evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from table_runs import FLOW, SD, VP_LEVELS, noise_of, ours, start
from torch import Tensor
from usf_schedules import usf_schedules

from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.scheduler import SolverScheduler

USF = usf_schedules()
READY = [name for name, schedule in USF.items() if all(s.param != "ems" for s in schedule.steps)]


@pytest.mark.law
def test_the_collection_is_the_published_one() -> None:
    """Counts that the method's sheet gives of all forty."""
    steps = [step for schedule in USF.values() for step in schedule.steps]
    assert len(USF) == 40 and len(steps) == 289
    assert Counter(s.param for s in steps) == {"ems": 104, "data": 101, "noise": 84}
    assert Counter(s.predict.order for s in steps) == {1: 82, 2: 138, 3: 65, 4: 4}
    assert sum(s.correct is not None for s in steps) == 144
    assert Counter(s.first for s in USF.values()) == {"zero_x0": 15, "mean": 14, "model": 11}
    assert all(schedule.nfe == schedule.meta["nfe"] for schedule in USF.values())
    scaled = [s for s in steps if s.predict.derivatives and s.predict.derivatives[0].scale.c]
    assert len(scaled) == 85


@pytest.mark.law
@pytest.mark.parametrize("name", USF)
def test_each_survives_json_and_compiles_or_says_what_it_lacks(name: str) -> None:
    """With statistics all of them run: `test_statistics.py`."""
    schedule = USF[name]
    assert SolverSchedule.from_json(schedule.to_json()) == schedule
    if name in READY:
        compile_schedule(schedule, VP_LEVELS)
    else:
        with pytest.raises(ValueError, match=r"step \d+: param 'ems' needs the model's statistics"):
            compile_schedule(schedule, VP_LEVELS)


@pytest.mark.law
@pytest.mark.parametrize("name", USF)
def test_each_runs_with_its_own_evaluations(name: str) -> None:
    """A point mass is nearly reached; data prediction stands for the steps that need statistics."""
    steps = tuple(replace(s, param="data" if s.param == "ems" else s.param) for s in USF[name].steps)
    schedule = replace(USF[name], steps=steps)
    calls: list[int] = []

    def denoise(x: Tensor, i: int) -> Tensor:
        calls.append(i)
        return torch.full_like(x, 0.2)

    table = compile_schedule(schedule, VP_LEVELS)
    x = table.run(denoise, start())
    assert len(calls) == schedule.nfe == len(set(calls))
    first = table.levels[0]
    if schedule.first == "model":
        end = table.levels[-1]
        exact = end.alpha * 0.2 + end.sigma / first.sigma * (start() - first.alpha * 0.2)
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-10)
    else:
        assert float((x / table.levels[-1].alpha - 0.2).abs().max()) < 0.3


@pytest.mark.law
@pytest.mark.parametrize("name", [name for name in READY if USF[name].first != "mean"])
def test_the_scheduler_runs_them(name: str) -> None:
    schedule = USF[name]
    scheduler = SolverScheduler(**SD, schedules=schedule)
    got = run_analytic(scheduler, schedule.nfe)
    torch.testing.assert_close(got, ours(schedule), rtol=0, atol=1e-5 * float(got.abs().max()))


def run_analytic(scheduler: Any, steps: int, begin: int = 0, x: Tensor | None = None) -> Tensor:
    """A pipeline's run: the start is scaled, the network sees what `scale_model_input` makes of x."""
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    hidden = len(scheduler._table.steps) - steps
    x = start() * scheduler.init_noise_sigma if x is None else x
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(noise_of(seen, i + hidden), t, x).prev_sample
    return x


def analytic(first: str, mean: tuple[float, ...] | None = None, **options: Any) -> SolverSchedule:
    return replace(presets.unipc(6, "log-snr", order=3, **options), first=first, mean=mean)


@pytest.mark.law
@pytest.mark.parametrize("param", ["data", "noise"])
def test_zero_x0_takes_the_noise_for_the_prediction(param: str) -> None:
    """The table with one evaluation less is the whole one, told eps = x at the first node."""
    schedule = analytic("zero_x0", param=param, final="sigma_min")
    whole = compile_schedule(replace(schedule, first="model"), VP_LEVELS)

    def denoise(x: Tensor, i: int) -> Tensor:
        at = whole.levels[i]
        return (x - at.sigma * (x if i == 0 else noise_of(x, i))) / at.alpha

    wanted = whole.run(denoise, start())
    got = run_analytic(SolverScheduler(**SD, schedules=schedule), 5)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    table = compile_schedule(schedule, VP_LEVELS)
    assert table.first is not None and table.first.shift * sum(table.first.mean) == 0


@pytest.mark.law
@pytest.mark.parametrize("mean", [(0.3,), (0.3, -0.1, 0.6)])
def test_the_mean_of_the_data_is_added_where_pipelines_look(mean: tuple[float, ...]) -> None:
    schedule = analytic("mean", mean)
    whole = compile_schedule(replace(schedule, first="model", mean=None), VP_LEVELS)
    point = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)

    def denoise(x: Tensor, i: int) -> Tensor:
        at = whole.levels[i]
        return point + 0 * x if i == 0 else (x - at.sigma * noise_of(x, i)) / at.alpha

    got = run_analytic(SolverScheduler(**SD, schedules=schedule), 5)
    torch.testing.assert_close(got, whole.run(denoise, start()), rtol=0, atol=1e-5)


@pytest.mark.law
def test_late_and_noised_starts_have_no_analytic_step() -> None:
    schedule = analytic("zero_x0")
    scheduler = SolverScheduler(**SD, schedules=schedule)
    scheduler.set_timesteps(5)
    x = scheduler.add_noise(start(), start().flip(0), scheduler.timesteps[:1].repeat(2))
    got = run_unscaled(scheduler, x)
    table = compile_schedule(schedule, VP_LEVELS, begin=1)
    wanted = table.run(lambda x, i: (x - table.levels[i].sigma * noise_of(x, i)) / table.levels[i].alpha, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def run_unscaled(scheduler: Any, x: Tensor) -> Tensor:
    for i, t in enumerate(scheduler.timesteps, 1):
        x = scheduler.step(noise_of(x, i), t, x).prev_sample
    return x


@pytest.mark.law
def test_flow_models_refuse_analytic_steps() -> None:
    scheduler = SolverScheduler(**FLOW, schedules=analytic("zero_x0"))
    with pytest.raises(ValueError, match="first step is analytic"):
        scheduler.set_timesteps(5)


@pytest.mark.law
def test_the_count_of_timesteps_is_the_count_of_evaluations_next_to_other_schedules() -> None:
    scheduler = SolverScheduler(**SD, schedules=[analytic("zero_x0"), presets.ddim(6)])
    for steps in (5, 6, 5):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert (scheduler.init_noise_sigma == 1.0) == (steps == 6)
