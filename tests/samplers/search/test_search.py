"""Searches: they find what is there, beat every stock solver on fresh pairs, or say that they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from benchmarks.closed_form import ModelProblem
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search import fits
from diffplug.samplers.search.decisions.starts import stock_schedules
from diffplug.samplers.search.leader import Callbacks, Problems
from diffplug.samplers.search.least_squares import fit, simplex
from diffplug.samplers.search.parameters import with_ratios
from diffplug.samplers.search.problem import errors
from diffplug.samplers.search.reference import refined
from diffplug.samplers.search.search import search_compensation
from diffplug.samplers.search.stages import run_stages
from diffplug.testing import tiny
from diffplug.testing.closed_form.guided_mixture import GuidedMixture

LINSPACE = Nodes(kind="name", name="linspace", final="sigma_min")
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = ["a red circle", "a blue square", "a green cross", "a yellow triangle"]


def mixture(n: int, seed: int, guidance: float = 7.5, fine: int = 200) -> ModelProblem:
    toy, scheduler = GuidedMixture(guidance), UniPCMultistepScheduler(**SD)
    noises, prompts = toy.pairs(n, seed)
    levels = NoiseLevels.from_scheduler(scheduler)

    def epsilon(x: torch.Tensor, timestep: float) -> torch.Tensor:
        level = levels.level(float(levels.sigma_of_time(timestep)))
        return (x - level.alpha * toy.x0(x, level.alpha, level.sigma, prompts)) / level.sigma

    return ModelProblem(epsilon, noises, levels, LINSPACE, fine)


class SecretProblem(ModelProblem):
    """A problem whose truth is what a known schedule of few steps does."""

    secret: SolverSchedule

    @property
    def reference(self) -> Any:  # type: ignore[override]
        return self.final(self.secret)

    def reference_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Any:
        run = self.run(self.secret)
        return np.concatenate([run.states, run.final[None]])


@pytest.mark.law
def test_secret_ratios_are_found() -> None:
    """A plain descent from 1 stops at .465 in the fourth; the grid finds the basin of .81."""
    plain = mixture(24, seed=1)
    problem = SecretProblem(plain.epsilon, plain.noises, plain.levels, LINSPACE)
    neutral = unipc(6, LINSPACE, disable_corrector=(0,))
    secret = {2: 0.93, 3: 0.81, 4: 1.22, 5: 1.07}
    problem.secret = with_ratios(neutral, secret)
    found = fits.ratios(problem, neutral, iterations=12)
    assert found.ratios[2:] == pytest.approx(list(secret.values()), abs=2e-3)


@pytest.mark.law
def test_least_squares_stays_in_its_bounds_and_survives_what_is_not_finite() -> None:
    def residuals(x: np.ndarray) -> np.ndarray:
        return np.array([x[0] - 3.0, 10 * (x[1] - x[0] ** 2)]) if x[0] < 2.5 else np.array([np.nan, np.nan])

    seen: list[np.ndarray] = []
    found = fit(residuals, np.array([0.5, 0.0]), bounds=(-1.0, 2.0), iterations=60, on_iterate=seen.append)
    assert found[0] <= 2.0 and found[1] <= 2.0 and np.isfinite(residuals(found)).all()
    assert found == pytest.approx([np.sqrt(2), 2.0], abs=0.02)
    assert np.array_equal(seen[0], [0.5, 0.0]) and np.array_equal(seen[-1], found)
    assert fit(residuals, np.array([])).size == 0


@pytest.mark.law
def test_a_ridge_keeps_numbers_near_their_start() -> None:
    def residuals(x: np.ndarray) -> np.ndarray:
        return x - 1.0

    assert fit(residuals, np.zeros(2), ridge=np.array([1.0, 0.0])) == pytest.approx([0.5, 1.0], abs=1e-6)


@pytest.mark.law
def test_a_simplex_leaves_a_basin_that_least_squares_cannot() -> None:
    """Ripples on a bowl: slopes lead to the nearest one, and a value may be infinite on the way."""

    def value(x: np.ndarray) -> float:
        ripples = 1 - np.cos(12 * (x - 1.0))
        return float(np.square(x - 1.0).sum() + 0.3 * ripples.sum()) if x[0] < 1.8 else np.inf

    seen: list[float] = []
    start = np.array([-0.5, 0.4])
    found = simplex(value, start, evaluations=80, on_better=lambda x: seen.append(value(x)))
    assert value(found) < 0.2 * value(start) and value(found) == min(seen)
    assert seen[0] == value(start) and seen == sorted(seen, reverse=True)
    assert simplex(value, np.array([])).size == 0


@pytest.mark.law
def test_the_grid_stage_finds_nodes_that_carry_the_secret() -> None:
    """The truth is what DDIM does on an uneven grid: starting from the even one, its end is found again."""
    plain = mixture(12, seed=1)
    problem = SecretProblem(plain.epsilon, plain.noises, plain.levels, LINSPACE)
    secret = Nodes(kind="timesteps", values=(999.0, 820.0, 540.0, 200.0), final="sigma_min")
    problem.secret = ddim(4, secret)
    start = ddim(4, LINSPACE)
    seen: list[SolverSchedule] = []
    found = fits.grid(problem, start, iterations=12, watch=seen.append)
    assert found.nodes.values == pytest.approx(secret.values, abs=1.0)
    assert seen[0] == replace(start, nodes=seen[0].nodes) and found in seen


@pytest.mark.law
def test_the_truth_goes_through_the_nodes_of_a_schedule() -> None:
    problem = mixture(4, seed=5, fine=60)
    schedule = unipc(6, LINSPACE)
    fine = refined(schedule, problem.levels, 60)
    own = schedule.nodes.sigmas(problem.levels, 6)
    assert np.array_equal(fine.nodes.sigmas(problem.levels, len(fine.steps))[::10], own)
    states = problem.reference_states(schedule)
    assert states.shape == (7, 4, 16)
    assert np.array_equal(states[0], problem.noises.numpy())
    assert np.abs(states[-1] - problem.reference).max() < 2e-3


@pytest.mark.law
@pytest.mark.slow
def test_every_stage_beats_the_stock_solvers_on_fresh_pairs() -> None:
    """Guidance 7.5, 5 evaluations: the bars are half the error for DC-Solver, a tenth for the best stage."""
    train, held_out, fresh = mixture(48, seed=1), mixture(64, seed=3), mixture(200, seed=2)
    stages: list[str] = []
    found = run_stages(
        Problems(train, held_out), 5, LINSPACE, stages=("ratios", "weights"),
        callbacks=Callbacks(on_stage=stages.append),
    )  # fmt: skip
    stock = min(errors(fresh, schedule).mean for schedule in stock_schedules(5, LINSPACE).values())
    ratios, weights = found.stages
    assert errors(fresh, ratios.schedule).mean < 0.5 * stock
    assert errors(fresh, weights.schedule).mean < min(0.1 * stock, errors(fresh, ratios.schedule).mean)
    assert errors(fresh, found.schedule).mean < 0.1 * stock
    assert found.improved and stages == ["presets", "ratios", "weights"]
    assert SolverSchedule.from_json(found.schedule.to_json()) == found.schedule


@pytest.mark.law
def test_a_search_that_finds_nothing_ships_the_best_stock_solver() -> None:
    """Held-out pairs of another world: whatever is fitted to the search's own is worse there."""
    train, held_out = mixture(2, seed=1, fine=60), mixture(16, seed=3, guidance=1.0, fine=60)
    held_out.noises = held_out.noises * 0.05
    found = run_stages(Problems(train, held_out), 4, LINSPACE, stages=("ratios",))
    best = min(errors(held_out, each).mean for each in stock_schedules(4, LINSPACE).values())
    assert errors(held_out, found.schedule).mean <= best
    assert found.improved == any(stage.accepted for stage in found.stages)


@pytest.mark.law
def test_nothing_beats_a_stock_solver_that_is_exact() -> None:
    train, plain = mixture(4, seed=1, fine=60), mixture(16, seed=3)
    held_out = SecretProblem(plain.epsilon, plain.noises, plain.levels, LINSPACE)
    held_out.secret = stock_schedules(4, LINSPACE)["DDIM"]
    found = run_stages(Problems(train, held_out), 4, LINSPACE, stages=("ratios", "grid"))
    assert not found.improved and [stage.accepted for stage in found.stages] == [False, False]
    assert found.baseline == "DDIM" and found.schedule == held_out.secret


def test_an_unknown_stage_is_refused() -> None:
    problem = mixture(2, seed=1, fine=10)
    with pytest.raises(ValueError, match="unknown stage 'ratio'. Did you mean 'ratios'"):
        run_stages(Problems(problem, problem), 4, LINSPACE, stages=("ratio",))


@pytest.mark.pipe
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_pipeline_is_searched_and_left_as_it_was(family: str, tmp_path: Path) -> None:
    pipe, small = tiny(family), {"height": 16, "width": 16}
    before = pipe.scheduler
    results: list[Any] = []
    found = search_compensation(
        pipe, PROMPTS, 3, 3.0, rungs=("ratios",), truth_steps=12, options=small, cache=tmp_path, tail=4,
        on_rung=results.append,
    )  # fmt: skip
    assert pipe.scheduler is before and [each.name for each in results] == ["ratios"]
    figures = found.schedule.meta
    assert figures["validation"]["mean"] <= min(each["mean"] for each in found.presets.values())
    assert figures["steps"] == 3 and figures["network calls"] > 0
    assert found.schedule.nfe == 3
    assert list(tmp_path.glob("truth-*")) and list(tmp_path.glob("search-*")) == [found.progress]
    found.forget()
    assert not list(tmp_path.glob("search-*"))


@pytest.mark.pipe
def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    pipe, small = tiny("sd15"), {"height": 16, "width": 16}
    call: dict[str, Any] = {"truth_steps": 12, "options": small, "cache": tmp_path, "tail": 4}

    def interrupt(stage: str) -> None:
        if stage == "grid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_compensation(pipe, PROMPTS, 3, 3.0, rungs=("ratios", "grid"), on_stage=interrupt, **call)
    assert len(list(tmp_path.glob("search-*"))) == 1
    stages: list[str] = []
    found = search_compensation(
        pipe, PROMPTS, 3, 3.0, rungs=("ratios", "grid"), on_stage=stages.append, **call
    )
    assert stages == ["presets", "grid"]
    assert [each.name for each in found.stages] == ["ratios", "grid"]


@pytest.mark.parametrize(
    ("prompts", "steps", "said"),
    [(["one"], 4, "0 to judge by"), (PROMPTS, 1, "needs at least 2"), ([], 4, "0 prompts to fit to")],
)
def test_bad_requests_are_refused_before_anything_is_spent(prompts: list[str], steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search_compensation(tiny("sd15"), prompts, steps)


def test_a_damaged_work_file_is_refused(tmp_path: Path) -> None:
    pipe, call = tiny("sd15"), {"truth_steps": 6, "options": {"height": 16, "width": 16}, "cache": tmp_path}
    call["tail"] = 4

    def interrupt(stage: str) -> None:
        if stage == "grid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_compensation(pipe, PROMPTS, 3, 3.0, rungs=("ratios", "grid"), on_stage=interrupt, **call)
    (work,) = tmp_path.glob("search-*")
    document = json.loads(work.read_text())
    document["done"] = {key: {} for key in document["done"]}
    work.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{work.name}.*remove it, or do not resume"):
        search_compensation(pipe, PROMPTS, 3, 3.0, rungs=("ratios",), **call)
