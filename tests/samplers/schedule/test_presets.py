"""Presets are the samplers they are named after, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from table_runs import SD, VP_LEVELS, noise_of, ours, start, theirs

from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Derivative, SolverStep, Update
from diffplug.samplers.solver.compile import compile_schedule

SINGLE = 1e-6  # of the largest value: those classes cast to float32
STEPS = 7


def sigmas_of(schedule: SolverSchedule) -> list[float]:
    return schedule.nodes.sigmas(VP_LEVELS, len(schedule.steps)).tolist()


def assert_same(schedule: SolverSchedule, scheduler: Any, tolerance: float) -> None:
    wanted = theirs(scheduler, sigmas_of(schedule))
    largest = float(wanted.abs().max())
    torch.testing.assert_close(ours(schedule), wanted, rtol=0, atol=tolerance * largest)


@pytest.mark.contract
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("grid", ["linspace", "karras", "log-snr"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, kind: str, corrected: bool, grid: str, final: str) -> None:
    if kind == "bh1" and final == "zero":
        pytest.skip("Diffusers' formula is 0 times infinity there")
    off = [0, 3] if corrected else list(range(STEPS))
    schedule = presets.unipc(STEPS, grid, order=order, kind=kind, disable_corrector=off, final=final)
    scheduler = UniPCMultistepScheduler(
        **SD, solver_order=order, solver_type=kind, disable_corrector=off, final_sigmas_type=final
    )
    assert_same(schedule, scheduler, 1e-12)


@pytest.mark.contract
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_noise_predictions(order: int, kind: str, lower: bool) -> None:
    options = {"order": order, "kind": kind, "lower_order_final": lower}
    schedule = presets.unipc(STEPS, param="noise", final="sigma_min", **options)
    scheduler = UniPCMultistepScheduler(
        **SD,
        solver_order=order,
        solver_type=kind,
        lower_order_final=lower,
        predict_x0=False,
        final_sigmas_type="sigma_min",
    )
    assert_same(schedule, scheduler, 1e-12)


@pytest.mark.contract
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("param", ["data", "noise"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_multistep(order: int, kind: str, param: str, final: str) -> None:
    if param == "noise" and final == "zero":
        pytest.skip("Diffusers' formula is 0 times infinity there")
    schedule = presets.dpmpp(STEPS, order=order, kind=kind, param=param, final=final)
    scheduler = DPMSolverMultistepScheduler(
        **SD,
        solver_order=order,
        solver_type=kind,
        algorithm_type="dpmsolver++" if param == "data" else "dpmsolver",
        final_sigmas_type=final,
    )
    assert_same(schedule, scheduler, SINGLE)


@pytest.mark.contract
@pytest.mark.parametrize("steps", [5, 6, 7])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_singlestep(order: int, kind: str, steps: int) -> None:
    schedule = presets.singlestep(steps, order=order, kind=kind, final="sigma_min")
    scheduler = DPMSolverSinglestepScheduler(
        **SD,
        solver_order=order,
        solver_type=kind,
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    assert_same(schedule, scheduler, SINGLE)


@pytest.mark.contract
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    schedule = presets.deis(STEPS, order=order, final="sigma_min")
    scheduler = DEISMultistepScheduler(**SD, solver_order=order)
    assert_same(schedule, scheduler, 1e-9)


@pytest.mark.contract
def test_ipndm() -> None:
    """Diffusers' class has nodes of its own and velocities; both are handed to it."""
    schedule = presets.ipndm(STEPS)
    table = compile_schedule(schedule, VP_LEVELS)
    sigmas = [level.sigma for level in table.levels]
    scheduler = IPNDMScheduler(trained_betas=sigmas)
    scheduler.set_timesteps(STEPS)
    scheduler.betas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.alphas = (1 - scheduler.betas**2) ** 0.5
    scheduler.set_begin_index(0)
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        eps, level = noise_of(x, i), table.levels[i]
        velocity = level.alpha * eps - level.sigma * (x - level.sigma * eps) / level.alpha
        x = scheduler.step(velocity, t, x).prev_sample
    torch.testing.assert_close(ours(schedule), x, rtol=0, atol=1e-6)


@pytest.mark.contract
def test_ddim() -> None:
    """On a grid that both can walk: DDIM goes from t to t - 125."""
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    ddim.set_timesteps(8)
    times = tuple(float(t) for t in ddim.timesteps)
    schedule = presets.ddim(8, Nodes(kind="timesteps", values=times, final="zero"))
    x = start()
    for i, t in enumerate(ddim.timesteps):
        x = ddim.step(noise_of(x, i), int(t), x).prev_sample
    torch.testing.assert_close(ours(schedule), x, rtol=0, atol=1e-6)


@pytest.mark.law
def test_the_noise_and_the_data_form_of_first_order_agree() -> None:
    for final in ("zero", "sigma_min"):
        noise = presets.dpmpp(STEPS, order=1, param="noise", final=final)
        torch.testing.assert_close(ours(noise), ours(presets.ddim(STEPS, final=final)), rtol=0, atol=1e-12)


@pytest.mark.law
def test_res_multistep_has_the_exact_second_order_weight() -> None:
    """x' = (s'/s) x + a' (1 - e^-h) D + a' (e^-h - 1 + h)/h_before (D - D_before), by hand."""
    schedule = presets.res_multistep(3, final="sigma_min")
    table = compile_schedule(schedule, VP_LEVELS)
    lam = [level.lam for level in table.levels]
    h, before, alpha = lam[2] - lam[1], lam[1] - lam[0], table.levels[2].alpha
    e = float(torch.exp(torch.tensor(-h, dtype=torch.float64)))
    turn = alpha * (e - 1 + h) / before
    weights = {(term.history, term.back): term.weight for term in table.steps[1].predict}
    assert weights[0, -1] == pytest.approx(alpha * (1 - e) + turn, rel=1e-12)
    assert weights[0, -2] == pytest.approx(-turn, rel=1e-12)
    assert weights[1, -1] == pytest.approx(table.levels[2].sigma / table.levels[1].sigma, rel=1e-12)


@pytest.mark.law
def test_a_true_third_order_differs_from_diffusers() -> None:
    """Diffusers' third order weighs the second derivative by a half; the table of the sheet says so."""
    wrong, right = presets.dpmpp(STEPS, order=3), presets.dpmpp(STEPS, order=3, true_third=True)
    assert float((ours(wrong) - ours(right)).abs().max()) > 1e-3


@pytest.mark.law
def test_an_unscaled_first_corrector_is_not_unipc() -> None:
    plain = Update(order=2, derivatives=(Derivative((1,)),))
    schedule = presets.unipc(STEPS)
    steps = (SolverStep(predict=schedule.steps[0].predict, correct=plain), *schedule.steps[1:])
    other = SolverSchedule(nodes=schedule.nodes, steps=steps)
    assert 1e-6 < float((ours(other) - ours(schedule)).abs().max()) < 1.0


@pytest.mark.law
@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_bad_requests_are_refused(name: str) -> None:
    make = presets.preset(name)
    with pytest.raises(ValueError, match="at least 1"):
        make(0)
    with pytest.raises(ValueError, match=r"unknown grid 'karas'. Did you mean 'karras'"):
        make(4, "karas")
    if name not in ("ddim", "res_multistep"):
        with pytest.raises(ValueError, match=f"order 9 of {'dpmpp' if name == 'dpm++' else name}: allowed"):
            make(4, order=9)


@pytest.mark.law
def test_unknown_presets_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'unipc'"):
        presets.preset("unipcc")
