"""DC-Solver on grids that a person gives: used as they are, or refused in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dc_runs import FLOW, NAN, RATIOS, ours, run, sample, start

from diffplug.samplers import DCSolverScheduler


@pytest.mark.law
@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.tensor])
def test_given_timesteps_and_sigmas_are_used(wrap: Any) -> None:
    times = [999, 850, 736, 645, 545, 455]
    scheduler = ours()
    scheduler.set_timesteps(timesteps=wrap(times))
    assert scheduler.timesteps.tolist() == times
    assert scheduler.timesteps.dtype == torch.int64
    sigmas = scheduler.sigmas[:-1].clone()
    scheduler.set_timesteps(sigmas=wrap(sigmas.tolist()))
    assert torch.equal(scheduler.sigmas[:-1], sigmas)
    assert scheduler.timesteps.tolist() == times
    assert float(scheduler.sigmas[-1]) == pytest.approx(0.0291675, abs=1e-6)


@pytest.mark.law
def test_the_usual_grid_given_by_hand_is_the_usual_run() -> None:
    scheduler = ours(dc_ratios=RATIOS)
    usual = run(scheduler)
    times, sigmas = scheduler.timesteps.clone(), scheduler.sigmas[:-1].clone()
    assert torch.equal(run(scheduler, timesteps=times.tolist()), usual)
    assert torch.equal(run(scheduler, sigmas=sigmas.numpy()), usual)


@pytest.mark.law
def test_fractional_timesteps_are_kept() -> None:
    scheduler = ours()
    scheduler.set_timesteps(timesteps=[998.5, 400.25, 20])
    assert scheduler.timesteps.tolist() == [998.5, 400.25, 20.0]


@pytest.mark.law
def test_flow_models_get_their_exact_time() -> None:
    scheduler = DCSolverScheduler(**FLOW)
    scheduler.set_timesteps(6)
    expected = [999.999, 937.57, 857.33, 750.37, 600.72, 376.40]
    assert scheduler.timesteps.tolist() == pytest.approx(expected, abs=0.006)
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


@pytest.mark.law
def test_flow_sigmas_are_used_as_given_and_the_pipelines_default_is_shifted() -> None:
    scheduler = DCSolverScheduler(**FLOW)
    for given in ([1.0, 0.9, 0.6, 0.3], [0.9, 0.5]):
        scheduler.set_timesteps(sigmas=given)
        assert torch.equal(scheduler.sigmas, torch.tensor([*given, 0.0]))
        assert bool(sample(scheduler, start()).isfinite().all())
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=2e-6)
    scheduler = DCSolverScheduler(**FLOW, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=1.0)
    shifted = [np.e / (np.e + 1 / s - 1) for s in (0.75, 0.5, 0.25)]
    assert scheduler.sigmas[1:-1].tolist() == pytest.approx(shifted, abs=1e-6)
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(4)


@pytest.mark.law
@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ({"sigmas": [1.0, 2.0]}, "decrease strictly"),
        ({"sigmas": [2.0, 1.0, 1.0]}, "decrease strictly"),
        ({"sigmas": [2.0, 1.0, 0.0]}, "leave out the final 0"),
        ({"sigmas": [2.0, NAN]}, "not finite"),
        ({"sigmas": [float("inf"), 1.0]}, "not finite"),
        ({"sigmas": [-1.0]}, "lie between"),
        ({"sigmas": []}, "flat list"),
        ({"sigmas": [[2.0, 1.0]]}, "flat list"),
        ({"sigmas": ["high", "low"]}, "not numbers"),
        ({"sigmas": [2.0, 0.02]}, "not above the terminal"),
        ({"timesteps": [100, 200]}, "decrease strictly"),
        ({"timesteps": [1000, 500]}, "lie between 0 and 999"),
        ({"timesteps": [500, 0]}, "not above the terminal"),
        ({"timesteps": [500], "sigmas": [1.0]}, "one of the two"),
        ({"num_inference_steps": 3, "timesteps": [500, 400]}, "has 2 nodes"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({}, "got nothing"),
    ],
    ids=str,
)
def test_bad_grids_are_refused(grid: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        ours().set_timesteps(**grid)
    assert "\n" not in str(caught.value)


@pytest.mark.law
def test_flow_levels_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DCSolverScheduler(**FLOW).set_timesteps(sigmas=[1.5, 0.5])
    with pytest.raises(ValueError, match="1000"):
        DCSolverScheduler(**FLOW).set_timesteps(timesteps=[1001, 500])
