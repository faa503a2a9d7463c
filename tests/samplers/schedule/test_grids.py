"""Named grids: the published values, Diffusers' own, and what holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given
from hypothesis import strategies as st
from table_runs import FLOW_LEVELS, SD, VP_LEVELS

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.grids import GRIDS, named_grid
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.solver.scheduler import SolverScheduler

FINALS = ("zero", "sigma_min")


@pytest.mark.law
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", sorted(GRIDS))
@given(st.integers(1, 30), st.sampled_from(FINALS))
def test_every_grid_decreases_from_noise_to_its_end(name: str, flow: bool, steps: int, final: str) -> None:
    levels = FLOW_LEVELS if flow else VP_LEVELS
    if flow and name.startswith("ays"):
        with pytest.raises(ValueError, match="choose another grid"):
            named_grid(name)(steps, levels, final)
        return
    nodes = named_grid(name)(steps, levels, final)
    assert nodes.dtype == np.float64 and nodes.shape == (steps + 1,)
    assert (np.diff(nodes) < 0).all()
    assert nodes[0] <= levels.sigma_max * (1 + 1e-12)
    assert nodes[-1] == (0.0 if final == "zero" else levels.sigma_min)


@pytest.mark.law
@pytest.mark.parametrize("name", ["linspace", "trailing", "beta57", "karras", "log-snr"])
def test_runs_of_very_many_steps_keep_their_nodes_apart(name: str) -> None:
    """Whole timesteps would coincide; a thousand steps and more are what a converged result takes."""
    for steps in (200, 1000, 1500):
        assert (np.diff(named_grid(name)(steps, VP_LEVELS, "zero").astype(np.float32)) < 0).all()


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("linspace", {}),
        ("leading", {"timestep_spacing": "leading"}),
        ("trailing", {"timestep_spacing": "trailing"}),
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
        ("beta", {"use_beta_sigmas": True}),
    ],
)
def test_diffusers_grids(name: str, config: dict[str, Any]) -> None:
    scheduler = UniPCMultistepScheduler(**SD, **config)
    for steps in (5, 8, 13):
        scheduler.set_timesteps(steps)
        nodes = torch.from_numpy(named_grid(name)(steps, VP_LEVELS, "zero")).float()
        torch.testing.assert_close(nodes, scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.law
def test_ten_steps_of_align_your_steps_are_the_table() -> None:
    for name, key in (("ays-sd", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")):
        nodes = named_grid(name)(10, VP_LEVELS, "zero")
        assert VP_LEVELS.time_of_sigma(nodes[:-1]).tolist() == AysSchedules[f"{key}Timesteps"]
        np.testing.assert_allclose(nodes, AysSchedules[f"{key}Sigmas"], rtol=2e-2)
        dense = named_grid(name)(19, VP_LEVELS, "zero")  # every second node is one of the ten
        np.testing.assert_allclose(dense[:-1:2], nodes[:-1], rtol=1e-12)


@pytest.mark.law
def test_even_log_snr_is_even() -> None:
    nodes = named_grid("log-snr")(8, VP_LEVELS, "sigma_min")
    np.testing.assert_allclose(np.diff(np.log(nodes), 2), 0, atol=1e-12)
    flow = named_grid("log-snr")(8, FLOW_LEVELS, "zero")[1:-1]
    np.testing.assert_allclose(np.diff(np.log(flow / (1 - flow)), 2), 0, atol=1e-9)


@pytest.mark.law
def test_beta57_is_dense_at_both_ends_and_denser_at_the_clean_one() -> None:
    times = VP_LEVELS.time_of_sigma(named_grid("beta57")(20, VP_LEVELS, "zero")[:-1])
    assert times[0] == 999 and bool((times == times.round()).all())
    from scipy.stats import beta

    assert times.tolist() == (999 * beta.ppf(1 - np.arange(20) / 20, 0.5, 0.7)).round().tolist()


@pytest.mark.law
def test_bong_tangent_has_two_arcs_that_meet_at_a_half() -> None:
    steps = 10
    nodes = named_grid("bong_tangent")(steps, VP_LEVELS, "zero") / VP_LEVELS.sigma_max
    count, first = steps + 2, int(0.6 * (steps + 2))
    assert nodes[0] == pytest.approx(1.0) and nodes[first - 1] == pytest.approx(0.5)
    bent = 0.5 * (1 + 2 / math.pi * np.arctan(-(8 / count) * (np.arange(first) - first)))
    wanted = 0.5 + 0.5 * (bent - bent[-1]) / (bent[0] - bent[-1])
    np.testing.assert_allclose(nodes[: first - 1], wanted[:-1], rtol=1e-12)


@pytest.mark.law
def test_levels_convert_both_ways() -> None:
    for levels in (VP_LEVELS, FLOW_LEVELS):
        sigmas = levels.sigma_of_time(np.array([900.0, 501.0, 33.0]))
        lams = [levels.level(float(s)).lam for s in sigmas]
        np.testing.assert_allclose(levels.sigma_of_lambda(lams), sigmas, rtol=1e-12)
    np.testing.assert_allclose(
        VP_LEVELS.time_of_sigma(VP_LEVELS.sigma_of_time([900, 501, 33])), [900, 501, 33]
    )
    assert VP_LEVELS.sigma_of_lambda(math.inf) == FLOW_LEVELS.sigma_of_lambda(math.inf) == 0
    assert (VP_LEVELS.sigma_min, VP_LEVELS.sigma_max) == pytest.approx((0.0291675, 14.6146), rel=1e-4)
    assert FLOW_LEVELS.sigma_max == 1 and FLOW_LEVELS.level(1.0).alpha > 0
    dynamic = NoiseLevels(None, 1000, math.e)
    assert dynamic.sigma_of_time(500.0) == pytest.approx(math.e / (math.e + 1))


CONVERTED = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
TERMINAL: dict[str, dict[str, bool]] = {"trailing": {}, **CONVERTED}


@pytest.mark.law
@pytest.mark.parametrize("name", TERMINAL)
def test_runs_end_at_the_terminal_sigma_where_diffusers_ends_them(name: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02, **TERMINAL[name])
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    ours = SolverScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, shift_terminal=0.02,
        grid=name, final_sigmas_type="zero",
    )  # fmt: skip
    ours.set_timesteps(8)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
    assert float(ours.sigmas[-2]) == pytest.approx(0.02, abs=1e-7)


@pytest.mark.law
@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("name", [name for name in GRIDS if not name.startswith("ays")])
def test_every_grid_reaches_the_terminal_sigma(name: str, final: str) -> None:
    levels = NoiseLevels(None, 1000, 3.0, 0.1)
    for steps in (1, 2, 7, 30):
        sigmas = Nodes(kind="name", name=name, final=final).sigmas(levels, steps)
        assert (np.diff(sigmas) < 0).all()
        reached = sigmas[-1] if final == "sigma_min" else sigmas[-2]
        assert reached == pytest.approx(0.1, rel=1e-12) or (steps == 1 and final == "zero")
