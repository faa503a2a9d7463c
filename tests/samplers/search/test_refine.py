"""Refinement: numbers read are numbers written, ends stay, other pairs decide, the budget is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_schedules import LEVELS, SPACE, mixture

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim, dpmpp, unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search import fits
from diffplug.samplers.search.decisions.evolution import random_values
from diffplug.samplers.search.fits import refine
from diffplug.samplers.search.parameters import BLOCKS, explicit
from diffplug.samplers.search.problem import SQUARED, Loss, errors
from diffplug.samplers.solver.compile import compile_schedule

LINSPACE = Nodes(kind="name", name="linspace", final="sigma_min")


def random_schedule(seed: int) -> SolverSchedule:
    return SPACE.schedule(random_values(SPACE, np.random.default_rng(seed)))


@pytest.mark.law
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read_and_changes_nothing_else(name: str, seed: int) -> None:
    schedule, block = random_schedule(seed), BLOCKS[name]
    theta = block.read(schedule)
    again = block.write(schedule, theta)
    np.testing.assert_allclose(block.read(again), theta, atol=1e-12)
    rows = [compile_schedule(each, LEVELS).steps for each in (schedule, again)]
    for one, two in zip(*rows, strict=True):
        weights = [{term[:2]: term.weight for row in step.rows for term in row} for step in (one, two)]
        for key in weights[0] | weights[1]:
            assert weights[0].get(key, 0.0) == pytest.approx(weights[1].get(key, 0.0), abs=1e-9)
    moved = block.write(schedule, theta + 0.05)
    np.testing.assert_allclose(block.read(moved), theta + 0.05, atol=1e-12)
    for other in set(BLOCKS) - {name}:
        np.testing.assert_allclose(BLOCKS[other].read(moved), BLOCKS[other].read(schedule), atol=1e-12)


@pytest.mark.law
def test_the_ends_of_a_grid_stay_and_a_clean_end_stays_clean() -> None:
    for final in ("sigma_min", "zero"):
        start = explicit(dpmpp(4, Nodes(kind="name", name="karras", final=final)), LEVELS)
        theta = BLOCKS["grid"].read(start)
        assert len(theta) == 3
        moved = BLOCKS["grid"].write(start, theta + np.array([0.5, -0.3, 0.1]))
        assert moved.nodes.values[0] == start.nodes.values[0]
        assert moved.nodes.values[-1] == start.nodes.values[-1]
        assert moved.nodes.values[1] != start.nodes.values[1]


@pytest.mark.law
def test_named_nodes_become_the_same_ones() -> None:
    schedule = unipc(5, LINSPACE)
    sigmas = [each.nodes.sigmas(LEVELS, 5) for each in (schedule, explicit(schedule, LEVELS))]
    np.testing.assert_allclose(sigmas[0], sigmas[1], rtol=1e-9)


@pytest.mark.law
def test_refinement_lowers_the_error_of_fresh_pairs_within_its_budget() -> None:
    train, judge, fresh = mixture(32, 1), mixture(32, 2), mixture(64, 3)
    start = dpmpp(4, LINSPACE)
    found, used = refine(train, start, score=lambda s: errors(judge, s).mean, evaluations=90)
    assert used <= 90
    assert errors(fresh, found).mean < 0.3 * errors(fresh, start).mean


@pytest.mark.law
def test_a_budget_too_small_for_every_stage_is_spent_on_the_first_one() -> None:
    """Four evaluations have 3 + 10 numbers in the first stage, more in the second: 15 runs make one step."""
    seen: list[SolverSchedule] = []

    def score(schedule: SolverSchedule) -> float:
        seen.append(schedule)
        return errors(judge, schedule).mean

    train, judge, start = mixture(32, 1), mixture(32, 2), dpmpp(4, LINSPACE)
    _, used = refine(train, start, score=score, evaluations=29)
    assert 15 <= used <= 29
    assert all(each.ratios == start.ratios for each in seen)
    assert min(errors(judge, each).mean for each in seen) < errors(judge, start).mean


@pytest.mark.law
@pytest.mark.parametrize(("enough", "looks"), [(0.0, True), (1.0, False)])
def test_other_nodes_are_looked_for_where_a_step_down_wins_little(
    enough: float, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffplug.samplers.search import fits as module

    asked: list[SolverSchedule] = []
    own = fits.regressed

    def regressed(problem: Any, schedule: SolverSchedule, **options: Any) -> SolverSchedule:
        asked.append(schedule)
        return own(problem, schedule, **options)

    monkeypatch.setattr(module, "ENOUGH", enough)
    monkeypatch.setattr(module, "regressed", regressed)
    train, judge, fresh, start = mixture(32, 1), mixture(32, 2), mixture(64, 3), dpmpp(4, LINSPACE)
    seen: list[int] = []
    found, used = refine(
        train,
        start,
        score=lambda s: errors(judge, s).mean,
        evaluations=120,
        on_better=lambda _, runs: seen.append(runs),
    )
    assert bool(asked) is looks and used <= 120
    assert seen == sorted(seen) and seen[-1] <= used
    assert errors(fresh, found).mean < 0.3 * errors(fresh, start).mean
    if looks:  # as it is, its nodes with first-order steps, and nodes that the simplex has moved
        as_it_is, plain, moved = asked
        assert all(each.deltas is None for each in asked)
        assert as_it_is.steps == start.steps and plain.steps == ddim(4, LINSPACE).steps
        assert as_it_is.nodes == plain.nodes != moved.nodes


@pytest.mark.law
@pytest.mark.parametrize("evaluations", [30, 46, 60, 75, 90])
def test_looking_round_never_takes_more_than_there_is(
    evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffplug.samplers.search import fits as module

    monkeypatch.setattr(module, "ENOUGH", 0.0)
    train, judge, start = mixture(16, 1), mixture(16, 2), dpmpp(4, LINSPACE)
    runs = 0
    final = train.final

    def counted(schedule: SolverSchedule) -> Any:
        nonlocal runs
        runs += 1
        return final(schedule)

    monkeypatch.setattr(train, "final", counted)
    _, used = refine(train, start, score=lambda s: errors(judge, s).mean, evaluations=evaluations)
    assert runs <= used <= evaluations


@pytest.mark.law
def test_a_regression_brings_every_next_state_nearer() -> None:
    train, start = mixture(32, 1), dpmpp(4, LINSPACE)
    found = fits.regressed(train, start, evaluations=40)
    truth = train.reference_states(start, 40)
    assert truth.shape == (5, 32, train.reference.shape[1])
    ours, theirs = (np.square(train.run(s).states - truth[:-1]).mean(axis=(1, 2)) for s in (found, start))
    assert (ours[1:] < theirs[1:]).all()
    assert errors(train, found).mean < errors(train, start).mean


@pytest.mark.law
def test_errors_without_hope_are_left_out_where_the_loss_forgives() -> None:
    """One pair is asked for what no solver reaches: with a robust loss the others still come near."""
    train, start = mixture(32, 1), dpmpp(4, LINSPACE)
    train.reference[0] = 100.0
    means = []
    for loss in (SQUARED, Loss(0.01)):
        train.loss = loss
        found, _ = refine(train, start, score=lambda s: errors(mixture(32, 2), s).median, evaluations=60)
        means.append(errors(mixture(64, 3), found).median)
    assert means[1] < 0.5 * means[0]


@pytest.mark.law
def test_other_pairs_decide() -> None:
    """A score that likes nothing but the start gets it back."""
    start = dpmpp(4, LINSPACE)
    found, used = refine(mixture(8, 1), start, score=lambda s: float(s != start), evaluations=40)
    assert found == start and used > 0


@pytest.mark.law
def test_an_interrupted_refinement_goes_on_from_what_it_has_reached() -> None:
    optuna = pytest.importorskip("optuna")
    from planted import search_space

    from benchmarks.search_methods import method
    from diffplug.samplers.search.decisions import stage as decision_stage

    storage, train, judge = optuna.storages.InMemoryStorage(), mixture(16, 1), mixture(16, 2)
    told = {"trials": 28, "grids": ("linspace",), "storage": storage, "method": method("random")}
    plain = search_space(train, judge, SPACE, **told)  # type: ignore[arg-type]
    seen: list[int] = []
    keep = optuna.Study.set_user_attr

    def stopping(study: object, key: str, value: object) -> None:
        keep(study, key, value)
        if key == decision_stage.REFINED:
            seen.append(value["runs"])  # type: ignore[index]
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", stopping)
        with pytest.raises(KeyboardInterrupt):
            search_space(train, judge, SPACE, refinement=60, **told)  # type: ignore[arg-type]
    before = train.network_cache.evaluated
    found = search_space(train, judge, SPACE, refinement=60, **told)  # type: ignore[arg-type]
    assert 0 < seen[-1] < 60 and found.spent == plain.spent + 60
    assert train.network_cache.evaluated - before < 4 * (60 - seen[-1]) + 10 * 4
    assert found.validation["value"] < plain.validation["value"]
    before = train.network_cache.evaluated
    again = search_space(train, judge, SPACE, refinement=60, **told)  # type: ignore[arg-type]
    assert again.schedule == found.schedule and train.network_cache.evaluated - before < 10 * 4
