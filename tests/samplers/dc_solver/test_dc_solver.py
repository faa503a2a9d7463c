"""DC-Solver: UniPC without ratios, the right compensation with them, and a state that is kept clean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dc_runs import FLOW, RATIOS, SD, network, ours, run, sample, start
from diffusers import UniPCMultistepScheduler

from diffplug.samplers import DCSolverScheduler
from diffplug.samplers.solver.compensation import compensate, compensation_weights, lagrange_weights
from diffplug.testing.closed_form.gaussian import GaussianModel


@pytest.mark.law
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"solver_order": 3, "solver_type": "bh1"},
        {"predict_x0": False},
        {"use_karras_sigmas": True},
        {"final_sigmas_type": "zero"},
        {"thresholding": True, "sample_max_value": 1.5},
        FLOW,
        {**FLOW, "final_sigmas_type": "zero"},
    ],
    ids=str,
)
def test_neutral_ratios_are_unipc(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Up to the rounding of UniPC's float32 numbers; a list of ones is no list, bit for bit."""
    config = {**SD, "final_sigmas_type": "sigma_min", "disable_corrector": [0], **config}
    wanted = run(UniPCMultistepScheduler(**config), dtype)
    got = run(DCSolverScheduler(**config), dtype)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(run(DCSolverScheduler(**config, dc_ratios=[1.0] * 6), dtype), got)


@pytest.mark.law
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_unipcs_own_arithmetic_in_double_precision_is_ours(
    solver_order: int, solver_type: str, predict_x0: bool
) -> None:
    """UniPC's code on the same sigmas as float64 numbers: what is left is the order of adding up."""
    options = {"solver_order": solver_order, "solver_type": solver_type, "predict_x0": predict_x0}
    scheduler = ours(**options)
    unipc = UniPCMultistepScheduler(**SD, **options, final_sigmas_type="sigma_min", disable_corrector=[0])
    scheduler.set_timesteps(6)
    unipc.set_timesteps(6)
    assert torch.equal(unipc.sigmas, scheduler.sigmas) and torch.equal(unipc.timesteps, scheduler.timesteps)
    unipc.sigmas = unipc.sigmas.double()
    wanted = sample(unipc, start())
    torch.testing.assert_close(
        sample(scheduler, start()), wanted, rtol=0, atol=1e-13 * float(wanted.abs().max())
    )


@pytest.mark.law
def test_defaults_are_the_methods_and_flow_ends_at_zero() -> None:
    config = DCSolverScheduler().config
    assert (config.final_sigmas_type, config.disable_corrector, config.solver_order) == ("sigma_min", [0], 2)
    assert (config.solver_type, config.dc_ratios, config.dc_order) == ("bh2", None, 2)
    assert config.dc_variable == "timestep"
    assert DCSolverScheduler(**FLOW).config.final_sigmas_type == "zero"
    assert DCSolverScheduler(**FLOW, final_sigmas_type="sigma_min").config.final_sigmas_type == "sigma_min"


@pytest.mark.law
@pytest.mark.parametrize("rho", [0.5, 0.9, 1.1, 1.7])
def test_weights_on_an_even_grid_are_the_papers(rho: float) -> None:
    even = [900.0, 700.0, 500.0, 300.0]
    quadratic = (rho * (rho + 1) / 2, 1 - rho**2, rho * (rho - 1) / 2)
    assert compensation_weights(even, [1, 1, rho], 2)[2] == pytest.approx(quadratic, abs=1e-14)
    assert compensation_weights(even, [1, rho, 1], 1) == {1: pytest.approx((rho, 1 - rho), abs=1e-14)}
    assert compensation_weights(even, [1, 1, 1, 1], 2) == {}


@pytest.mark.law
@pytest.mark.parametrize("order", [1, 2, 3])
def test_compensation_is_exact_for_polynomials(order: int) -> None:
    nodes, target = [13.0, 55.0, 124.0, 343.0][: order + 1], -20.0
    weights = lagrange_weights(nodes, target)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    for degree in range(order + 1):
        values = [torch.tensor([float(t) ** degree], dtype=torch.float64) for t in nodes]
        assert float(compensate(values, weights)) == pytest.approx(target**degree, rel=1e-12)


@pytest.mark.law
def test_compensation_adds_up_in_float32() -> None:
    outputs = [torch.full((4,), 2049.0).half() for _ in range(3)]
    weights = (11.0, -20.0, 10.0)
    mixed = compensate(outputs, weights)
    assert mixed.dtype == torch.float16
    assert torch.equal(mixed, outputs[0])  # 11 * 2048 alone is beyond float16's whole numbers


@pytest.mark.law
@pytest.mark.parametrize("variable", ["timestep", "lambda"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_history_holds_the_compensated_outputs(variable: str, solver_order: int) -> None:
    """Each output kept is the Lagrange value of the raw newest and the compensated older ones."""
    scheduler = ours(
        dc_ratios=RATIOS, dc_variable=variable, solver_order=solver_order, lower_order_final=False
    )
    scheduler.set_timesteps(6)
    times = scheduler.timesteps if variable == "timestep" else -torch.log(scheduler.sigmas[:-1].double())
    nodes, x, history = times.double().numpy(), start(), []
    for i, t in enumerate(scheduler.timesteps):
        output = network(x, i)
        sigma = float(scheduler.sigmas[i])
        raw = (x - sigma / (1 + sigma**2) ** 0.5 * output) * (1 + sigma**2) ** 0.5
        x = scheduler.step(output, t, x).prev_sample
        if i >= 2:
            points = nodes[[i, i - 1, i - 2]]
            at = points[1] + RATIOS[i] * (points[0] - points[1])
            values = torch.stack([raw, history[-1], history[-2]]).reshape(3, -1).numpy()
            quadratic = np.stack([np.polyval(np.polyfit(points, v, 2), at) for v in values.T])
            raw = torch.from_numpy(quadratic).reshape(raw.shape)
        torch.testing.assert_close(scheduler.model_outputs[-1], raw, rtol=1e-5, atol=1e-6)
        history.append(scheduler.model_outputs[-1])


@pytest.mark.law
@pytest.mark.parametrize(
    "config", [{}, {"predict_x0": False}, {"solver_order": 3}, {"dc_order": 1}, FLOW], ids=str
)
@pytest.mark.parametrize("variable", ["timestep", "lambda"])
def test_a_point_mass_is_sampled_exactly_with_any_ratios(config: dict[str, Any], variable: str) -> None:
    ratios = [1.0, 1.0, 1.0, 0.3, 1.9, -0.5, 1.4]
    config = {**config, "final_sigmas_type": "zero", "disable_corrector": []}
    scheduler = ours(dc_ratios=ratios, dc_variable=variable, **config)
    scheduler.set_timesteps(7)
    target, x = (
        torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64),
        torch.randn(1, 1, 2, 2, dtype=torch.float64),
    )
    for t, s in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(s)
        eps = (x - alpha * target) / sigma
        x = scheduler.step(eps - target if "use_flow_sigmas" in config else eps, t, x).prev_sample
    torch.testing.assert_close(x, target, rtol=0, atol=2e-5)


def path(scheduler: Any, model: GaussianModel, x: torch.Tensor) -> torch.Tensor:
    """All samples of a run, each over its own alpha: [N + 1, ...]; x: the first one over alpha."""
    sigmas = scheduler.sigmas.double()
    alphas = 1 - sigmas if scheduler.config.use_flow_sigmas else 1 / (1 + sigmas**2) ** 0.5
    x, seen = x * alphas[0], [x]
    for t, alpha in zip(scheduler.timesteps, alphas[1:], strict=True):
        x = scheduler.step(model(scheduler, x, t), t, x).prev_sample
        seen.append(x / alpha)
    return torch.stack(seen)


@pytest.mark.law
@pytest.mark.parametrize("options", [{}, {"solver_order": 3, "solver_type": "bh1"}, {"dc_order": 1}], ids=str)
@pytest.mark.parametrize("variable", ["timestep", "lambda"])
def test_one_model_seen_as_any_prediction_type_gives_one_path(variable: str, options: dict[str, Any]) -> None:
    """With ratios, correctors and all: epsilon, v and clean; velocity and clean for flow models."""
    model = GaussianModel(mean=0.3 * torch.ones(3, 4, 4, dtype=torch.float64), variance=0.2)
    given = {"dc_ratios": RATIOS, "dc_variable": variable, "disable_corrector": [], **options}
    for kinds, flow in (
        (("epsilon", "v_prediction", "sample"), False),
        (("flow_prediction", "sample"), True),
    ):
        paths = []
        for kind in kinds:
            scheduler = ours(
                **given, prediction_type=kind, use_flow_sigmas=flow, final_sigmas_type="sigma_min"
            )
            scheduler.set_timesteps(timesteps=[900, 730, 610, 400, 250, 90])
            paths.append(path(scheduler, model, start()))
        for other in paths[1:]:
            torch.testing.assert_close(other, paths[0], rtol=0, atol=2e-6)


@pytest.mark.law
def test_a_flow_and_a_noise_model_with_the_same_lambdas_walk_the_same_path() -> None:
    """x / alpha is the same state; compensation over lambda, since their timesteps have nothing in common."""
    model = GaussianModel(mean=0.3 * torch.ones(3, 4, 4, dtype=torch.float64), variance=0.2)
    ratios = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.2])
    paths = []
    for config, sigmas in (({}, ratios), ({"use_flow_sigmas": True}, ratios / (1 + ratios))):
        scheduler = ours(**config, prediction_type="sample", dc_ratios=RATIOS, dc_variable="lambda")
        scheduler.set_timesteps(sigmas=sigmas)
        paths.append(path(scheduler, model, start())[:-1])  # their ends are not the same
    torch.testing.assert_close(paths[1], paths[0], rtol=0, atol=2e-5)


@pytest.mark.law
def test_thresholding_holds_after_the_compensation() -> None:
    scheduler = ours(dc_ratios=[1, 1, 1.9, 0.2, 1.9, 1.9], thresholding=True, sample_max_value=1.0)
    scheduler.set_timesteps(6)
    x = start()
    for call, t in enumerate(scheduler.timesteps):
        x = scheduler.step(3 * network(x, call), t, x).prev_sample
        assert float(scheduler.model_outputs[-1].abs().max()) <= 1.0 + 1e-12


@pytest.mark.law
@pytest.mark.parametrize("config", [{"predict_x0": True}, {"predict_x0": False}], ids=str)
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_the_end_at_sigma_zero_is_the_clean_prediction(
    config: dict[str, Any], solver_type: str, lower_order_final: bool
) -> None:
    options = {"solver_type": solver_type, "lower_order_final": lower_order_final, "disable_corrector": []}
    scheduler = ours(final_sigmas_type="zero", **options, **config)
    x = run(scheduler)
    assert bool(x.isfinite().all())
    if config["predict_x0"]:
        assert torch.equal(x, scheduler.model_outputs[-1])
    else:  # the noise belongs to the sample that the network saw, the state is the corrected one
        scale = (1 + float(scheduler.sigmas[-2]) ** 2) ** 0.5
        clean = scheduler.model_outputs[-1] + scale * (scheduler.last_sample - scheduler.seen_samples[-1])
        torch.testing.assert_close(x, clean, rtol=1e-12, atol=1e-12)


@pytest.mark.law
def test_no_step_waits_for_the_device() -> None:
    """Tensors on the meta device have no values: whatever asks for one fails."""
    scheduler = ours(dc_ratios=RATIOS, disable_corrector=[])
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = torch.zeros(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3, 4, 4)


@pytest.mark.law
@pytest.mark.parametrize("begin", range(6))
def test_a_late_start_indexes_ratios_by_grid_node(begin: int) -> None:
    """Until three outputs exist nothing is compensated; then ratio i acts at node i, not at call i."""
    scheduler = ours(dc_ratios=RATIOS)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    late = sample(scheduler, start(), begin)
    first = begin + 2
    expected = ours(dc_ratios=[1.0] * first + RATIOS[first:] if first < 6 else None)
    expected.set_timesteps(6)
    expected.set_begin_index(begin)
    assert torch.equal(late, sample(expected, start(), begin))
    plain = ours()
    plain.set_timesteps(6)
    plain.set_begin_index(begin)
    assert torch.equal(late, sample(plain, start(), begin)) == (first >= 6)


@pytest.mark.law
def test_a_new_run_starts_clean_and_a_finished_one_says_so() -> None:
    scheduler = ours(dc_ratios=RATIOS, solver_order=1)
    wanted = run(scheduler)
    scheduler.set_timesteps(6)
    sample(scheduler, start(), stop=4)
    assert len(scheduler.model_outputs) == 3
    scheduler.set_timesteps(6)
    assert scheduler.model_outputs == scheduler.solver_states == scheduler.seen_samples == []
    assert (scheduler.last_sample, scheduler.step_index) == (None, None)
    assert torch.equal(sample(scheduler, start()), wanted)
    with pytest.raises(ValueError, match="all 6 steps are done"):
        scheduler.step(start(), scheduler.timesteps[-1], start())


@pytest.mark.law
def test_a_timestep_off_the_grid_is_refused() -> None:
    scheduler = ours()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 321 is not on the grid"):
        scheduler.step(start(), 321, start())


@pytest.mark.law
def test_scale_noise_is_add_noise() -> None:
    scheduler = DCSolverScheduler(**FLOW)
    scheduler.set_timesteps(4)
    clean, eps, t = start(), start().flip(0), scheduler.timesteps[2]
    noisy = scheduler.scale_noise(clean, t, eps)
    s = float(scheduler.sigmas[2])
    torch.testing.assert_close(noisy, (1 - s) * clean + s * eps, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="noise="):
        scheduler.scale_noise(clean, t)
