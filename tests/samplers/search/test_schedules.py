"""The search over schedules: seeded, resumable, better than every preset on pairs it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from benchmarks.closed_form import ModelProblem
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.search.decisions.evolution import random_values
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.problem import errors
from diffplug.testing.closed_form.guided_mixture import GuidedMixture

optuna = pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from planted import search_space  # noqa: E402

from benchmarks.lstm_ranks import LSTMRanks, hinge  # noqa: E402
from benchmarks.search_methods import METHODS  # noqa: E402
from benchmarks.search_methods import method as searcher  # noqa: E402
from diffplug.samplers.search.decisions.evolution import S3Sampler, TreeRanks, features  # noqa: E402
from diffplug.samplers.search.decisions.starts import preset_schedules  # noqa: E402
from diffplug.samplers.search.metric import LatentError  # noqa: E402

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINSPACE = Nodes(kind="name", name="linspace", final="sigma_min")
LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))


def mixture(n: int, seed: int) -> ModelProblem:
    toy = GuidedMixture(2.0)
    noises = toy.pairs(n, seed)[0]

    def epsilon(x: torch.Tensor, timestep: float) -> torch.Tensor:
        level = LEVELS.level(float(LEVELS.sigma_of_time(timestep)))
        return (
            x - level.alpha * toy.x0(x, level.alpha, level.sigma, torch.zeros(len(x), dtype=torch.long))
        ) / level.sigma

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


def suggested(trial: Any) -> dict[str, Any]:
    """The values of the space that the study's sampler suggests."""
    return {
        d.name: trial.suggest_float(d.name, d.low, d.high)
        if d.real
        else trial.suggest_categorical(d.name, d.choices)
        for d in SPACE.dimensions
    }


def planted_study(method: Any, trials: int = 240, storage: Any = None) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=method, storage=storage, study_name="planted", load_if_exists=True)

    def objective(trial: Any) -> float:
        return planted(suggested(trial))

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


class _Misled:
    """A predictor that expects the longer a first step the better."""

    def fit(self, rows: Any, scores: Any) -> None:
        pass

    def predict(self, rows: Any) -> Any:
        return rows[:, 0] - rows[:, 1]


@pytest.mark.law
@pytest.mark.parametrize(("families", "least"), [(0.0, 0), (0.5, 2)])
def test_the_best_schedule_has_children_though_its_like_are_bad(families: float, least: int) -> None:
    """A short first step is the best here and all other presets begin with long ones."""
    sampler = S3Sampler(SPACE, seed=0, batch=8, explore=0, families=families, predictor=_Misled())
    study = optuna.create_study(sampler=sampler)
    rng = np.random.default_rng(0)
    for i in range(12):
        study.enqueue_trial(random_values(SPACE, rng) | {"gap_0": -1.9 if i == 4 else 1.5})
    firsts = []

    def objective(trial: Any) -> float:
        firsts.append(suggested(trial)["gap_0"])
        return float(firsts[-1])

    study.optimize(objective, n_trials=12 + 3 * 8)
    assert sum(gap < -0.5 for gap in firsts[12:]) >= least
    assert families or all(gap > 0 for gap in firsts[12:])


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
def test_the_lstm_learns_an_order_of_schedules() -> None:
    """Schedules whose third node lies further are worse: found in others of the same kind."""
    rng = np.random.default_rng(0)
    values = [random_values(SPACE, rng) for _ in range(160)]
    rows = np.array([features(SPACE, each) for each in values])
    scores = np.exp(3 * rows[:, 2])
    lstm = LSTMRanks(SPACE, seed=0, epochs=40)
    lstm.fit(rows[:120], scores[:120])
    order = np.argsort(np.argsort(lstm.predict(rows[120:])))
    assert np.corrcoef(order, np.argsort(np.argsort(scores[120:])))[0, 1] > 0.7
    again = LSTMRanks(SPACE, seed=0, epochs=40)
    again.fit(rows[:120], scores[:120])
    assert np.array_equal(again.predict(rows), lstm.predict(rows))


@pytest.mark.law
def test_the_hinge_counts_pairs_in_the_wrong_order() -> None:
    ranks = torch.tensor([0.0, 1.0, 2.0])
    assert float(hinge(torch.tensor([0.0, 1.0, 2.0]), ranks)) == 0
    assert float(hinge(torch.tensor([2.0, 1.0, 0.0]), ranks)) == pytest.approx((2 + 2 + 3) / 3)
    assert float(hinge(torch.tensor([2.0, 1.0, 0.0]), ranks, least=1.5)) == 3


@pytest.mark.law
@pytest.mark.slow
def test_a_searched_schedule_beats_every_preset_on_fresh_pairs() -> None:
    train, validation, fresh = mixture(64, 1), mixture(64, 2), mixture(200, 3)
    seen: list[tuple[float, float]] = []
    found = search_space(
        train, validation, SPACE, test=fresh, trials=110, refinement=80, on_trial=lambda *t: seen.append(t)
    )
    best = min(errors(fresh, each).mean for each in preset_schedules(SPACE).values())
    assert (
        found.improved and 110 <= found.spent - 80 < 112 and len(found.study.trials) > 110
    )  # some are given up
    assert errors(fresh, found.schedule).mean < 0.4 * best
    assert found.test is not None and found.test["mean"] == errors(fresh, found.schedule).mean
    assert [best for _, best in seen] == sorted((best for _, best in seen), reverse=True)
    assert list(found.history)[-1][1] == seen[-1][1] and len(found.finalists) == 5


@pytest.mark.parametrize("method", ["s3", "evolution", *METHODS])
def test_every_method_runs_and_is_seeded(method: str) -> None:
    train, validation = mixture(8, 1), mixture(8, 2)
    grids = ("linspace",)
    runs = [
        search_space(train, validation, SPACE, trials=32, method=searcher(method), grids=grids, seed=1)
        for _ in range(2)
    ]
    assert [t.params for t in runs[0].study.trials] == [t.params for t in runs[1].study.trials]
    assert len(runs[0].study.trials) == 32
    if method == "cmaes":  # only real numbers move after the presets
        fixed = [d.name for d in SPACE.dimensions if not d.real]
        assert len({tuple(t.params[name] for name in fixed) for t in runs[0].study.trials[8:]}) == 1
        moved = [tuple(t.params.values()) for t in runs[0].study.trials[8:]]
        assert len(set(moved)) == 24


def test_bad_requests_are_refused() -> None:
    problem = mixture(2, 1)
    with pytest.raises(ValueError, match="unknown aggregate 'mse'"):
        search_space(problem, problem, SPACE, metric=LatentError("mse"))
    with pytest.raises(ValueError, match="unknown search method 's4'. Did you mean 's3'"):
        search_space(problem, problem, SPACE, method="s4")
    with pytest.raises(ValueError, match="48 presets come first and then a batch of 20, give at least 68"):
        search_space(problem, problem, SPACE, trials=60)
    with pytest.raises(ValueError, match="no budget: give trials"):
        search_space(problem, problem, SPACE, trials=None)
    with pytest.raises(ValueError, match=r"seconds=0.001: the presets and one batch are 28 schedules"):
        search_space(problem, problem, SPACE, trials=None, seconds=1e-3, grids=("linspace",))
    with pytest.raises(ValueError, match=r"none of the grids \(none given\) exists for 4 evaluations"):
        search_space(problem, problem, SPACE, grids=())
    with pytest.raises(ValueError, match="refinement=-1: give 0 for none"):
        search_space(problem, problem, SPACE, refinement=-1)
    with pytest.raises(ValueError, match="batch=0: give at least 1"):
        S3Sampler(SPACE, batch=0)
    with pytest.raises(ValueError, match="families=1.5: a share, give a number from 0 to 1"):
        S3Sampler(SPACE, families=1.5)
    with pytest.raises(ValueError, match="epochs=0: give at least 1"):
        LSTMRanks(SPACE, epochs=0)


@pytest.mark.law
def test_what_was_fitted_to_a_seed_is_not_lost() -> None:
    """The space encodes decisions; a seed's weights are not among them, and are the best there is here."""
    from diffplug.samplers.schedule.presets import dpmpp
    from diffplug.samplers.search.fits import refine

    train, judge = mixture(16, 1), mixture(16, 2)
    fitted, _ = refine(train, dpmpp(4, LINSPACE), score=lambda s: errors(judge, s).mean, evaluations=90)
    assert fitted.deltas is not None
    told: dict[str, Any] = {"trials": 29, "grids": ("linspace",), "method": searcher("random")}
    found = search_space(train, judge, SPACE, seeds=[fitted], **told)
    assert found.schedule == fitted
    assert found.validation["value"] < search_space(train, judge, SPACE, **told).validation["value"]
