"""Scores on growing parts: the same winner for fewer runs, and a test that knows chance from difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from planted import Planted

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.presets import ddim
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.comparison import PairedComparison, p_value
from diffplug.samplers.search.metric import AGGREGATES, WORST, LatentError

LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler())
SCHEDULES = [ddim(n, "linspace") for n in range(2, 42)]
GRAIN = np.random.default_rng(0).lognormal(0, 0.5, size=128)


def by_steps(schedule: SolverSchedule) -> Any:
    """Best at 20 steps, worse on both sides; pairs differ more than schedules do."""
    jitter = np.random.default_rng(len(schedule.steps)).lognormal(0, 0.05, size=128)
    return (0.1 + 0.01 * abs(len(schedule.steps) - 20)) * GRAIN * jitter


@pytest.mark.law
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_giving_up_saves_runs_and_keeps_the_winner(aggregate: str) -> None:
    found = {}
    for prune in (False, True):
        contest = PairedComparison(Planted(by_steps, LEVELS), LatentError(aggregate), prune=prune)
        best = SCHEDULES[0]
        for schedule in SCHEDULES[1:]:
            scored = contest.score(schedule, best)
            if scored.pairs == 128 and scored.value < contest.score(best).value:
                best = schedule
        found[prune] = best, contest.spent, contest.problem.evaluations
    assert found[True][0] == found[False][0]
    assert found[False][1] == len(SCHEDULES) and found[True][1] < 0.9 * len(SCHEDULES)
    assert found[True][2] == pytest.approx(128 * found[True][1])


@pytest.mark.law
def test_what_is_given_up_is_worse_than_what_it_was_held_against() -> None:
    contest = PairedComparison(Planted(by_steps, LEVELS), LatentError())
    bar = contest.score(SCHEDULES[18])
    scored = contest.score(SCHEDULES[38], SCHEDULES[18])
    assert scored.pairs == 32 and scored.value > bar.value
    whole = contest.score(SCHEDULES[38])
    assert whole.pairs == 128 and scored.value == pytest.approx(whole.value, rel=0.3)


@pytest.mark.law
def test_chance_alone_is_rarely_called_a_difference() -> None:
    rng = np.random.default_rng(1)
    calls = []
    for seed in range(200):
        grain = rng.lognormal(size=64)
        one, two = (grain * rng.lognormal(0, 0.3, size=64) for _ in range(2))
        calls.append(p_value(one, two, AGGREGATES["mean"], seed))
    assert 0.02 < np.mean(np.array(calls) <= 0.1) < 0.2
    assert p_value(2 * one, one, AGGREGATES["median"]) <= 0.01
    assert p_value(one, one, AGGREGATES["mean"]) == 1.0


@pytest.mark.law
def test_what_is_not_finite_is_the_worst_and_stops_at_once() -> None:
    def off(schedule: SolverSchedule) -> Any:
        return np.where(np.arange(128) == 3, np.nan, 1.0)

    contest = PairedComparison(Planted(off, LEVELS), LatentError())
    scored = contest.score(SCHEDULES[0])
    assert scored.value == WORST and scored.pairs == 32 and contest.spent == 0.25


@pytest.mark.law
def test_a_schedule_above_the_limit_is_worse_than_any_below() -> None:
    contest = PairedComparison(Planted(by_steps, LEVELS), LatentError("median"), limit=0.02)
    inside, outside, far = (contest.score(SCHEDULES[i]).value for i in (18, 28, 38))
    assert inside < 1 < WORST < outside < far
