"""SVDD: laws on chains with known answers, and what it returns and refuses on a pipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from benchmarks.steering.chain import Steered, steer
from diffplug.intercept import StepInterceptor, intercept_step
from diffplug.plug import plug
from diffplug.steering import SVDD, CoDe, TwoLevel
from diffplug.steering.engine.score_times import every_block
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import Selector, kl_bound, one_survivor, the_best
from diffplug.testing import tiny
from diffplug.testing.closed_form.chain import BETAS, GAUSSIAN, TWO_HUMPS, ddim

Z_GAUSSIAN, Z_HUMPS = 10.2877135, 2.3410407
law, on_pipe = pytest.mark.law, pytest.mark.pipe


def svdd(
    strength: float, m: int, rule: Selector = one_survivor, tilt: str = "constant"
) -> Callable[[int], Any]:
    """Return a builder of SVDD's filter."""
    return lambda groups: ParticleFilter(
        groups=groups,
        particles=m,
        potential=Difference(strength=strength, tilt=tilt),
        generators=[torch.Generator().manual_seed(1)],
        resampler=rule,
    )


def run(data: Any, strength: float, m: int, groups: int, block: int = 1, **options: Any) -> Steered:
    """Return a steered chain that selects every `block` calls."""
    make = svdd(strength, m, options.pop("rule", one_survivor), options.pop("tilt", "constant"))
    return steer(
        data,
        options.pop("reward", lambda x: x),
        strength=strength,
        plan=every_block(block),
        groups=groups,
        particles=m,
        make_filter=make,
        **options,
    )


def selected(steered: Steered, strength: float) -> tuple[float, float]:
    """Return mean and variance of the outputs, one candidate of each group by softmax of r(x) = x."""
    share = torch.softmax(strength * steered.x, -1) / len(steered.x)
    mean = (share * steered.x).sum()
    return float(mean), float((share * (steered.x - mean) ** 2).sum())


@law
@pytest.mark.parametrize(
    ("data", "z", "strength", "m", "mean", "variance"),
    [
        (GAUSSIAN, Z_GAUSSIAN, 2.0, 2, 1.158, 0.163),
        (GAUSSIAN, Z_GAUSSIAN, 2.0, 8, 1.287, 0.162),
        (TWO_HUMPS, Z_HUMPS, 1.0, 2, 0.648, 3.796),
        (TWO_HUMPS, Z_HUMPS, 1.0, 8, 1.706, 1.936),
    ],
)
def test_outputs_are_biased_as_stated_and_the_weights_repair_it(
    data: Any, z: float, strength: float, m: int, mean: float, variance: float
) -> None:
    steered = run(data, strength, m, groups=24_000 // m)
    ratio, error, _ = steered.ratio(z)
    assert abs(ratio - 1) < 4 * error
    found = selected(steered, strength)
    assert found[0] == pytest.approx(mean, abs=0.05)
    assert found[1] == pytest.approx(variance, rel=0.08)


@law
def test_blocks_stay_nearer_to_the_unsteered_law() -> None:
    """Means before the choice among the finished candidates; with that choice the weights are exact too."""
    runs = [run(TWO_HUMPS, 1.0, 8, 2500, block) for block in (2, 10)]
    assert [float(r.x.mean()) for r in runs] == pytest.approx([1.672, 1.030], abs=0.1)
    ratio, error, _ = runs[1].ratio(Z_HUMPS)
    assert abs(ratio - 1) < 4 * error


@law
def test_forgetting_the_parent_breaks_the_normaliser() -> None:
    class Forgetful(ParticleFilter):
        def select(self, *args: Any, **kwargs: Any) -> Any:
            chosen = super().select(*args, **kwargs)
            self.base = torch.zeros_like(self.base)
            return chosen

    steered = steer(
        GAUSSIAN,
        lambda x: x,
        strength=2.0,
        plan=every_block(1),
        groups=300,
        particles=4,
        make_filter=lambda groups: Forgetful(
            groups=groups,
            particles=4,
            potential=Difference(strength=2.0, tilt="constant"),
            generators=[torch.Generator().manual_seed(1)],
            resampler=one_survivor,
        ),
    )
    assert steered.ratio(Z_GAUSSIAN)[0] > 1e3


@law
def test_greedy_selection_equals_a_plain_loop_with_the_same_noise() -> None:
    """Candidates of one parent, the best by its clean prediction goes on: written out without the engine."""
    steered = run(GAUSSIAN, 1.0, 4, groups=1, rule=the_best, steps=6)
    scheduler = ddim()
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, dtype=torch.float64, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        abar = float(scheduler.alphas_cumprod[int(t)])
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        x0 = GAUSSIAN.x0hat(x, alpha, sigma)
        if i < 5:
            best = int(x0[:, 0].argmax())
            x, x0 = x[[best] * 4], x0[[best] * 4]
        x = scheduler.step((x - alpha * x0) / sigma, t, x, eta=1.0, generator=generator).prev_sample
    torch.testing.assert_close(steered.x[0], x[:, 0], rtol=0, atol=1e-6)


@law
def test_greedy_selection_does_not_care_about_the_scale() -> None:
    plain = run(TWO_HUMPS, 1.0, 4, groups=20, rule=the_best, steps=8)
    bent = run(TWO_HUMPS, 1.0, 4, groups=20, rule=the_best, steps=8, reward=lambda x: (5 * x + 3).exp())
    assert torch.equal(plain.x, bent.x)


@law
def test_after_a_selection_a_group_is_one_candidate_with_one_history() -> None:
    """Sample, output and history are M identical rows; after the step all differ."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=2)
    seen: list[bool] = []

    class Look(StepInterceptor):
        def on_step(self, call: Any) -> Any:
            kept = [call.sample, call.model_output, *(o for o in scheduler.model_outputs if o is not None)]
            same = all(torch.equal(v, v.reshape(3, 4, 1)[:, :1].expand(3, 4, 1).reshape(12, 1)) for v in kept)
            result = call.run()
            after = result.prev_sample.reshape(3, 4)
            seen.append(same and all(len(row.unique()) == 4 for row in after))
            return result

    undo = intercept_step(scheduler, Look())  # the engine is attached later, so it stands outside
    run(GAUSSIAN, 2.0, 4, groups=3, scheduler=scheduler, steps=6)
    undo()
    assert seen[:5] == [True] * 5


@law
def test_the_divergence_of_greedy_selection() -> None:
    assert kl_bound(20, 50) == pytest.approx(102, abs=0.5)
    assert kl_bound(20, 1) == pytest.approx(math.log(20) - 19 / 20)
    assert kl_bound(1, 9) == 0.0


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Return a tiny pipeline with a stochastic solver."""
    built = tiny("sd15")
    built.scheduler = EulerAncestralDiscreteScheduler.from_config(built.scheduler.config)
    return built


def call(pipe: Any, steerer: Any, prompt: Any = "a", **options: Any) -> Any:
    """Return the pictures of a short steered call."""
    common = {"num_inference_steps": 5, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    with plug(pipe, steerer) as plugged:
        return plugged(prompt, **{**common, **options}).images


@on_pipe
def test_groups_share_no_ancestor_and_each_gives_its_best(pipe: Any) -> None:
    steerer = SVDD(red, particles=6, duplicates=3, strength=1.0)
    images = call(pipe, steerer, ["a", "b"], num_images_per_prompt=2)
    report = steerer.report
    assert len(images) == 4
    assert report.calls == (0, 1, 2, 3)
    groups = torch.arange(6) // 3
    assert bool((report.ancestors // 3 == groups).all())
    assert report.distinct_roots.tolist()[-1] == [2, 2]
    assert all({slot // 3 for slot in slots} == {0, 1} for slots in report.returned)
    assert torch.isfinite(report.log_z).all()
    assert report.network_rows == 5 * 2 * 2 * 6


@on_pipe
def test_code_scores_fewer_calls_and_two_levels_return_weights(pipe: Any) -> None:
    code = CoDe(red, particles=4, block=2)
    call(pipe, code)
    assert code.report.calls == (1, 3)
    two = TwoLevel(red, particles=4, strength=5.0)
    call(pipe, two)
    assert two.report.final_log_weights.shape == (1, 4)
    assert float(two.report.ess.min()) >= 1


@on_pipe
def test_greedy_warns_how_far_it_can_go(pipe: Any) -> None:
    steerer = SVDD(red, particles=4, greedy=True)
    with pytest.warns(UserWarning, match=r"greedy selection 5 times among 4 candidates .* up to 3\.2 nats"):
        call(pipe, steerer)
    assert bool(torch.isnan(steerer.report.log_z).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(pipe, SVDD(red, particles=4, strength=1 / 0.5))


@on_pipe
@pytest.mark.parametrize("steerer", [SVDD, CoDe, TwoLevel])
def test_deterministic_solvers_are_refused_and_the_pipeline_is_restored(pipe: Any, steerer: Any) -> None:
    stochastic, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        with pytest.raises(ValueError, match="DDIMScheduler adds no noise, so all candidates.*BestOfN"):
            call(pipe, steerer(red, particles=4, proposal=None))
        assert type(pipe.scheduler) is DDIMScheduler
        call(pipe, steerer(red, particles=4), eta=1.0)
    finally:
        pipe.scheduler = stochastic


@law
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SVDD(red, particles=8, duplicates=3), "duplicates=3 does not divide particles=8"),
        (lambda: SVDD(red, duplicates=0), "duplicates=0"),
        (lambda: SVDD(red, alpha=0.0), "say greedy=True"),
        (lambda: SVDD(red, alpha=0.1, strength=3.0), "alpha=0.1 and strength=3.0 disagree"),
        (lambda: SVDD(red, strength=math.inf), "strength=inf"),
        (lambda: SVDD(red, strength=-1.0), "strength=-1.0"),
        (lambda: SVDD(red, block=0), "block=0"),
        (lambda: SVDD(red, greedy=True, returns="sample"), "no weights to draw by"),
        (lambda: TwoLevel(red, ess_threshold=2.0), "ess_threshold=2.0"),
    ],
)
def test_bad_options_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@law
def test_alpha_is_another_word_for_strength() -> None:
    with pytest.warns(FutureWarning, match="alpha=0.25 is strength=1 / 0.25 now"):
        assert SVDD(red, alpha=0.25) == SVDD(red, strength=4.0)
