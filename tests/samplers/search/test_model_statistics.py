"""Statistics measured from runs: exact for a Gaussian, a gain on a mixture, the same through a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from test_schedules import LEVELS, LINSPACE, mixture

from benchmarks.closed_form import ModelProblem
from diffplug.rollout import Rollouts
from diffplug.samplers import ModelStatistics, SolverSchedule
from diffplug.samplers.schedule.presets import ddim, unipc
from diffplug.samplers.search.model_statistics import measure_statistics
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.problem import errors
from diffplug.testing import tiny

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.3, 0.01, 1.0], dtype=torch.float64)


def gaussian(n: int = 32) -> ModelProblem:
    def epsilon(x: torch.Tensor, timestep: float) -> torch.Tensor:
        at = LEVELS.level(float(LEVELS.sigma_of_time(timestep)))
        return at.sigma * (x - at.alpha * MEAN) / (at.alpha**2 * VARIANCE + at.sigma**2)

    noises = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ModelProblem(epsilon, noises, LEVELS, LINSPACE, 200)


def standing_on(schedule: SolverSchedule, statistics: ModelStatistics, path: Path) -> SolverSchedule:
    statistics.save(path)
    steps = tuple(replace(step, param="ems") for step in schedule.steps)
    return replace(schedule, steps=steps, statistics=str(path))


@pytest.mark.law
def test_a_gaussian_has_one_answer_and_one_step_reaches_its_end(tmp_path: Path) -> None:
    problem = gaussian()
    found = measure_statistics(problem, points=100, smooth=0)
    at = [LEVELS.level(float(np.exp(-lam))) for lam in found.lambdas]
    wanted = [[a.sigma**2 / (a.alpha**2 * v + a.sigma**2) for v in VARIANCE.tolist()] for a in at]
    np.testing.assert_allclose(found.l, wanted, atol=2e-3)  # the toy is told times, which are interpolated
    for n in (1, 3):
        plain = ddim(n, LINSPACE)
        schedule = standing_on(plain, found, tmp_path / "s.safetensors")
        assert errors(problem, schedule).mean < 1e-3 * errors(problem, plain).mean


@pytest.mark.law
def test_measured_statistics_help_a_mixture(tmp_path: Path) -> None:
    train, fresh = mixture(128, 1), mixture(64, 3)
    found = measure_statistics(train, points=50, told={"guidance": "2"})
    assert train.network_cache.evaluated == 100 and found.shape == (16,) and found.told == {"guidance": "2"}
    for make in (ddim, unipc):
        plain = make(5, LINSPACE)
        assert (
            errors(fresh, standing_on(plain, found, tmp_path / "s.safetensors")).mean
            < 0.1 * errors(fresh, plain).mean
        )


@pytest.mark.pipe
@pytest.mark.parametrize(("name", "shape"), [("sd15", (4, 1, 1)), ("flux", (1, 4)), ("wan", (16, 1, 1, 1))])
def test_every_family_can_be_measured(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    left_out = ("prompt", "num_inference_steps", "output_type")
    options = {key: value for key, value in tiny.inputs(name).items() if key not in left_out}
    trials = Rollouts(tiny(name), ["a dog", "a cat"], [0, 1], 4, options=options, max_rows=1)
    problem = PipelineProblem(trials, LINSPACE)
    found = measure_statistics(problem, points=8)
    whole = measure_statistics(problem, points=8, elements=True)
    assert found.shape == shape and whole.shape == problem.sample_shape
    schedule = standing_on(ddim(3, "linspace", final="sigma_min"), found, tmp_path / "s.safetensors")
    steps: Any = (replace(schedule.steps[0], param="data"), *schedule.steps[1:])
    assert np.isfinite(problem.final(replace(schedule, steps=steps))).all()


@pytest.mark.law
def test_what_the_network_is_shown_is_what_was_asked() -> None:
    """The predictions at a run's own states are those of the run."""
    pipe = tiny("sd15")
    problem = PipelineProblem(Rollouts(pipe, ["a", "b", "c"], [0, 1, 2], 4, 2.0, max_rows=2), LINSPACE)
    schedule = ddim(4, LINSPACE)
    run = problem.run(schedule)
    np.testing.assert_allclose(problem.predictions(schedule, run.states), run.data, atol=1e-5)
    other = problem.predictions(schedule, run.states + 0.1)
    assert abs(other[1:] - run.data[1:]).mean() > 1e-4
    np.testing.assert_allclose(other[0], run.data[0], atol=1e-5)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="points=4: differences along lambda need at least 8"):
        measure_statistics(gaussian(), points=4)
