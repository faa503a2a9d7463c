"""The engine on chains with known answers: unbiased normaliser, right means, and the traps that plausible
versions fall into.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from benchmarks.steering.chain import ChainRule, steer
from diffplug.intercept import StepInterceptor, intercept_step
from diffplug.steering.engine import history as engine_module
from diffplug.steering.engine.rule import ScoredStep
from diffplug.steering.engine.score_times import every_block, every_call, scored_calls
from diffplug.steering.engine.step import ParticleSteps, remaining_steps
from diffplug.testing.closed_form.chain import BETAS, GAUSSIAN, TWO_HUMPS, ddim, denoise

pytestmark = pytest.mark.law

Z_GAUSSIAN = 10.2877135  # data N(1, .25), r = x, lambda = 2: exp(2 m + 2 v) of the chain's own law
FIVE_CALLS = [4, 8, 12, 16, 19]


def identity(x: torch.Tensor) -> torch.Tensor:
    """Return the reward r(x) = x."""
    return x


def never(n: int) -> list[int]:
    """Return the plan that scores nothing before the end."""
    return []


def always(n: int) -> range:
    """Return the plan that scores at every call, the last one too."""
    return range(n)


def test_the_stated_law_of_the_chain_is_the_one_it_draws() -> None:
    """Linear recursion of the chain on Gaussian data gives m = 0.99883, v = 0.16664, hence Z."""
    scheduler = ddim()
    rows = torch.zeros(22, 1, dtype=torch.float64)
    rows[1] = 1.0
    scheduler.set_timesteps(20)

    class Basis(StepInterceptor):
        count = 0

        def on_step(self, call: Any) -> Any:
            noise = torch.zeros_like(rows)
            noise[2 + self.count] = 1.0
            self.count += 1
            call.kwargs["variance_noise"] = noise
            return call.run()

    undo = intercept_step(scheduler, Basis())
    end = denoise(scheduler, GAUSSIAN, rows, eta=1.0)[:, 0]
    undo()
    mean, variance = float(end[0]), float(((end[1:] - end[0]) ** 2).sum())
    assert mean == pytest.approx(0.9988309, abs=1e-5)
    assert variance == pytest.approx(0.1666443, abs=1e-5)
    assert math.exp(2 * mean + 2 * variance) == pytest.approx(Z_GAUSSIAN, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({"plan": never}, 1.216),
        ({"plan": lambda n: FIVE_CALLS}, 1.238),
        ({"plan": lambda n: FIVE_CALLS, "tilt": "rising"}, 1.230),
        ({"plan": lambda n: FIVE_CALLS, "resampler": "residual"}, None),
        ({"plan": lambda n: FIVE_CALLS, "resampler": "multinomial", "tilt": "rising"}, None),
        ({"plan": always, "ess_threshold": 0.5}, 1.216),
        ({"plan": always, "ess_threshold": 0.7, "tilt": "rising"}, None),
    ],
)
def test_the_normaliser_is_unbiased(options: dict[str, Any], mean: float | None) -> None:
    run = steer(GAUSSIAN, identity, strength=2.0, groups=8000, **options)
    ratio, error, spread = run.ratio(Z_GAUSSIAN)
    assert abs(ratio - 1) < 4 * error
    assert 0.3 < spread < 0.6
    if mean is not None:
        value, error = run.weighted_mean()
        assert abs(value - mean) < 4 * error + 0.002


def test_carried_weights_keep_steering_alive_under_an_ess_rule() -> None:
    """Forgetting the weight where nothing was resampled gives back the unsteered mean, 0.9965 (exact tilted
    mean: 1.332).
    """

    def forgetful(engine: ParticleSteps) -> None:
        build = engine.rule.build_filter

        def broken(groups: int) -> Any:
            filt = build(groups)
            select = filt.select

            def dropping(*args: Any, **kwargs: Any) -> Any:
                selection = select(*args, **kwargs)
                filt.base = filt.psi.clone()
                return selection

            filt.select = dropping
            return filt

        engine.rule = ChainRule(4, engine.rule.plan(), broken)

    options: dict[str, Any] = {"strength": 2.0, "groups": 8000, "plan": always, "ess_threshold": 0.5}
    right, error = steer(GAUSSIAN, identity, **options).weighted_mean()
    wrong, _ = steer(GAUSSIAN, identity, **options, patch=forgetful).weighted_mean()
    assert abs(right - 1.215) < 4 * error + 0.002
    assert abs(wrong - 0.9965) < 4 * error + 0.005


def test_rising_tilt_beats_constant_tilt_on_two_humps() -> None:
    options: dict[str, Any] = {"strength": 3.0, "groups": 1500, "particles": 16, "plan": always}
    rising = steer(TWO_HUMPS, identity, **options, tilt="rising")
    constant = steer(TWO_HUMPS, identity, **options, tilt="constant")
    ratio, error, spread = rising.ratio(225.80105)
    assert abs(ratio - 1) < 4 * error
    assert spread < 1.2 < constant.ratio(225.80105)[2]
    assert rising.weighted_mean()[0] == pytest.approx(2.474, abs=0.03)


def test_selection_comes_before_the_noise_of_its_own_step() -> None:
    """The lagged order (step first, copy afterwards) reaches 2.170 instead of 2.456."""
    run = steer(TWO_HUMPS, identity, strength=3.0, groups=4000, plan=always)
    mean, error = run.weighted_mean()
    assert abs(mean - 2.456) < 4 * error + 0.02


def sde() -> Any:
    """Return the second-order SDE-DPM-Solver++, whose history belongs to particles."""
    return DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=2)


@pytest.mark.parametrize("broken", [False, True])
def test_history_goes_with_its_particle(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the tilted variance is .160 (exact .163); a particle with another one's history gives .183."""
    if broken:
        monkeypatch.setattr(engine_module, "reindex_scheduler", lambda *args: None)
    run = steer(
        GAUSSIAN, identity, strength=2.0, groups=4000, particles=16, plan=always, scheduler=sde(), steps=10
    )
    weights = torch.softmax(run.logw, -1) / len(run.x)
    mean = (weights * run.x).sum()
    variance = float((weights * (run.x - mean) ** 2).sum())
    ratio, error, _ = run.ratio(math.exp(2 * 0.99883 + 2 * 0.16273))
    if broken:
        assert variance > 0.175
    else:
        assert variance == pytest.approx(0.160, abs=0.006)
        assert abs(ratio - 1) < 4 * error


def test_a_deterministic_solver_keeps_copies_and_says_so_once() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, solver_order=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = steer(
            GAUSSIAN, identity, strength=2.0, groups=300, particles=8, plan=always, scheduler=scheduler
        )
    told = [str(w.message) for w in caught if "added no noise" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith("DPMSolverMultistepScheduler")
    assert "sde-dpmsolver++" in told[0]
    distinct = sum(len(row.unique()) for row in run.x) / len(run.x)
    assert 5.2 < distinct < 6.4


def test_a_stochastic_solver_parts_copies_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = steer(GAUSSIAN, identity, strength=2.0, groups=50, particles=8, plan=every_call)
    assert all(len(row.unique()) == 8 for row in run.x)


def test_a_batch_that_does_not_split_is_refused() -> None:
    scheduler = ddim()
    engine = ParticleSteps(ChainRule(4, every_call, lambda groups: None), lambda step: step.x0)  # type: ignore
    undo = intercept_step(scheduler, engine)
    with pytest.raises(ValueError, match="a batch of 6 cannot be split into groups of 4 particles"):
        denoise(scheduler, GAUSSIAN, torch.zeros(6, 1))
    undo()
    assert type(scheduler) is DDIMScheduler


def test_a_new_schedule_starts_over() -> None:
    run = steer(GAUSSIAN, identity, strength=2.0, groups=5, plan=lambda n: FIVE_CALLS)
    engine, scheduler = run.engine, ddim()
    first = engine.filter
    undo = intercept_step(scheduler, engine)
    denoise(scheduler, GAUSSIAN, torch.randn(20, 1), eta=1.0)
    undo()
    assert engine.filter is not first
    assert [s.call for s in engine.filter.selections] == FIVE_CALLS  # type: ignore[union-attr]


def test_a_copied_scheduler_follows_its_leader() -> None:
    """A second stream that carries the particle's number ends with the number of each particle's root."""
    scheduler = ddim()
    scheduler.set_timesteps(6)
    seen: list[int] = []

    def score(step: ScoredStep) -> torch.Tensor:
        seen.append(step.index)
        return step.x0[:, 0]

    template = steer(GAUSSIAN, identity, strength=2.0, groups=3, plan=never).engine
    engine = ParticleSteps(ChainRule(4, every_call, template.rule.build_filter), score)
    undo = intercept_step(scheduler, engine)
    second = copy.deepcopy(scheduler)
    x = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tags = torch.arange(12, dtype=torch.float64)[:, None]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, eta=1.0).prev_sample
        tags = second.step(tags, t, tags).prev_sample
    undo()
    plain = torch.arange(12, dtype=torch.float64)[:, None]
    third = ddim()
    third.set_timesteps(6)
    for t in third.timesteps:
        plain = third.step(plain, t, plain).prev_sample
    roots = engine.filter.roots + torch.arange(3)[:, None] * 4  # type: ignore[union-attr]
    assert seen == [0, 1, 2, 3, 4]
    assert len(roots.unique()) < 12
    assert torch.equal(tags, plain[roots.reshape(-1)])


def test_a_copy_that_runs_ahead_is_refused() -> None:
    scheduler = ddim()
    scheduler.set_timesteps(4)
    undo = intercept_step(scheduler, steer(GAUSSIAN, identity, strength=1.0, groups=1, plan=never).engine)
    scheduler.set_timesteps(4)
    second = copy.deepcopy(scheduler)
    with pytest.raises(ValueError, match="before its original"):
        second.step(torch.zeros(4, 1), second.timesteps[0], torch.zeros(4, 1))
    undo()


def test_two_stage_solvers_are_scored_at_first_stages() -> None:
    scheduler = HeunDiscreteScheduler(**BETAS)
    calls: list[tuple[int, bool]] = []
    template = steer(GAUSSIAN, identity, strength=1.0, groups=1, plan=never).engine

    def score(step: ScoredStep) -> torch.Tensor:
        calls.append((step.index, bool(scheduler.state_in_first_order)))
        return step.x0[:, 0]

    engine = ParticleSteps(ChainRule(4, lambda n: [1, 4, 7], template.rule.build_filter), score)
    undo = intercept_step(scheduler, engine)
    scheduler.set_timesteps(6)
    x = torch.randn(4, 1)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    undo()
    assert calls == [(2, True), (4, True), (8, True)]


def test_plans_count_from_the_fractions_and_leave_the_last_call_out() -> None:
    plan = scored_calls((0.2, 0.4, 0.6, 0.8, 1.0))
    assert plan(20) == [4, 8, 12, 16]
    assert plan(4) == [1, 2]
    assert plan(1) == []
    assert scored_calls(())(20) == []
    assert list(every_call(4)) == [0, 1, 2]


def test_blocks_count_back_from_the_end() -> None:
    assert every_block(1)(4) == [0, 1, 2]
    assert every_block(5)(20) == [0, 5, 10, 15]
    assert every_block(5)(12) == [2, 7]
    assert every_block(30)(20) == []
    with pytest.raises(ValueError, match="block=0"):
        every_block(0)


def test_a_run_that_starts_late_is_shorter() -> None:
    scheduler = ddim()
    scheduler.set_timesteps(10)
    assert remaining_steps(scheduler, scheduler.timesteps[0]) == 10
    assert remaining_steps(scheduler, scheduler.timesteps[6]) == 4
    solver = sde()
    solver.set_timesteps(10)
    solver.set_begin_index(3)
    assert remaining_steps(solver, solver.timesteps[3]) == 7
