"""The search over schedules: seeded, resumable, better than every preset on pairs it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffplug.samplers.nodes import Nodes
from diffplug.samplers.noise_levels import NoiseLevels
from diffplug.samplers.search.problem import ModelProblem, errors
from diffplug.samplers.search.space import ScheduleSpace
from diffplug.testing.guided_mixture import GuidedMixture

optuna = pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from diffplug.samplers.search.s3 import S3Sampler, TreeRanks, features  # noqa: E402
from diffplug.samplers.search.schedules import METRICS, preset_schedules, search_space  # noqa: E402

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINSPACE = Nodes(kind="name", name="linspace", final="sigma_min")
LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))


def mixture(n: int, seed: int) -> ModelProblem:
    toy = GuidedMixture(1.0)
    noises, prompts = toy.pairs(n, seed)

    def epsilon(x: torch.Tensor, timestep: float) -> torch.Tensor:
        level = LEVELS.level(float(LEVELS.sigma_of_time(timestep)))
        return (x - level.alpha * toy.x0(x, level.alpha, level.sigma, prompts)) / level.sigma

    return ModelProblem(epsilon, noises, LEVELS, LINSPACE, 100)


SPACE = ScheduleSpace(4, LEVELS, LINSPACE)


def planted(values: dict[str, Any]) -> float:
    """A score with its lowest value at known decisions."""
    wanted = {"param": "noise", "order": 2, "correct": True}
    score = 0.0
    for name, value in values.items():
        kind = name.partition("_")[0]
        score += float(kind in wanted and value != wanted[kind])
        score += abs(value - 0.5) if kind == "gap" else 0.0
    return score


def planted_study(method: Any, trials: int = 240, storage: Any = None) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=method, storage=storage, study_name="planted", load_if_exists=True)

    def objective(trial: Any) -> float:
        values = {
            d.name: trial.suggest_float(d.name, d.low, d.high)
            if d.real
            else trial.suggest_categorical(d.name, d.choices)
            for d in SPACE.dimensions
        }
        return planted(values)

    study.optimize(objective, n_trials=trials - len(study.trials))
    return study


@pytest.mark.law
@pytest.mark.slow
def test_guided_evolution_finds_what_was_planted_and_beats_chance() -> None:
    guided = planted_study(S3Sampler(SPACE, seed=0)).best_value
    chance = planted_study(optuna.samplers.RandomSampler(0)).best_value
    assert guided < 0.6 * chance


@pytest.mark.law
def test_the_same_seed_proposes_the_same() -> None:
    runs = [planted_study(S3Sampler(SPACE, seed=3, batch=8), 30) for _ in range(2)]
    assert [t.params for t in runs[0].trials] == [t.params for t in runs[1].trials]
    other = planted_study(S3Sampler(SPACE, seed=4, batch=8), 30)
    assert [t.params for t in other.trials] != [t.params for t in runs[0].trials]


def test_a_study_goes_on_from_its_storage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    planted_study(S3Sampler(SPACE, seed=0, batch=8), 20, storage)
    study = planted_study(S3Sampler(SPACE, seed=0, batch=8), 40, storage)
    assert len(study.trials) == 40 and len({tuple(sorted(t.params.items())) for t in study.trials}) == 40


@pytest.mark.law
def test_trees_learn_an_order() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 6))
    scores = np.exp(3 * rows[:, 0] + rows[:, 1])
    trees = TreeRanks(0)
    trees.fit(rows[:200], scores[:200])
    order = np.argsort(np.argsort(trees.predict(rows[200:])))
    assert np.corrcoef(order, np.argsort(np.argsort(scores[200:])))[0, 1] > 0.8


def test_features_have_one_length() -> None:
    analytic = ScheduleSpace(4, LEVELS, LINSPACE, analytic=True)
    lengths = set()
    for schedule in preset_schedules(SPACE).values():
        values = {**analytic.values(schedule)}
        lengths |= {len(features(analytic, {**values, "first": first})) for first in ("model", "zero_x0")}
    assert len(lengths) == 1


@pytest.mark.law
@pytest.mark.slow
def test_a_searched_schedule_beats_every_preset_on_fresh_pairs() -> None:
    train, validation, fresh = mixture(64, 1), mixture(64, 2), mixture(200, 3)
    seen: list[tuple[int, float]] = []
    found = search_space(train, validation, SPACE, trials=110, on_trial=lambda *told: seen.append(told))
    best = min(errors(fresh, each).mean for each in preset_schedules(SPACE).values())
    assert found.improved and found.trials == 110 and len(seen) == 110
    assert errors(fresh, found.schedule).mean < 0.6 * best
    assert list(found.history) == sorted(found.history, reverse=True)


def test_bad_requests_are_refused() -> None:
    problem = mixture(2, 1)
    with pytest.raises(ValueError, match="unknown metric 'mse'"):
        search_space(problem, problem, SPACE, metric="mse")
    with pytest.raises(ValueError, match="unknown search method 's4'. Did you mean 's3'"):
        search_space(problem, problem, SPACE, method="s4")
    with pytest.raises(ValueError, match="presets come first, give more than that"):
        search_space(problem, problem, SPACE, trials=10)
    with pytest.raises(ValueError, match="batch=0: give at least 1"):
        S3Sampler(SPACE, batch=0)


@pytest.mark.law
def test_metrics_of_known_errors() -> None:
    from diffplug.samplers.search.problem import Errors

    off = Errors(np.array([1.0] * 19 + [100.0]))
    assert METRICS["mean"](off) == pytest.approx(5.95) and METRICS["trimmed"](off) == 1.0
    assert METRICS["median"](off) == 1.0 and METRICS["log"](off) == pytest.approx(np.log(100) / 20)
