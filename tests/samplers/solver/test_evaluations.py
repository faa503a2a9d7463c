"""Evaluations: N steps are N network calls with every solver and family, and a search counts its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dc_runs import RATIOS

from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.samplers import DCSolver, DCSolverScheduler, Solver, search_compensation
from diffplug.samplers.schedule import presets
from diffplug.testing import tiny

PROMPTS = ["a red circle", "a blue square", "a green cross", "a yellow triangle"]
SMALL = {"height": 16, "width": 16}


def calls(family: str, solver: Any, steps: int, **call: Any) -> int:
    """How often the network of a tiny pipeline is called; the result has to be finite."""
    pipe = tiny(family)
    options = tiny.inputs(family, num_inference_steps=steps, output_type="latent", **call)
    with plug(pipe, solver), count_network(pipe) as count:
        result = pipe(**options, generator=torch.Generator().manual_seed(0))
    assert bool(torch.as_tensor(result[0]).isfinite().all())
    return count.calls


@pytest.mark.pipe
@pytest.mark.parametrize(
    "family", ["sd15", "sdxl", "controlnet", "pixart", "sd3", "flux", "wan", "qwenimage"]
)
def test_six_steps_of_dc_solver_are_six_evaluations(family: str) -> None:
    """Twice as many where the pipeline evaluates the prompt and the empty one by themselves."""
    apart = 2 if family == "wan" else 1
    assert calls(family, DCSolver(RATIOS), 6) == 6 * apart


@pytest.mark.pipe
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", sorted(presets.PRESETS))
def test_every_preset_evaluates_once_a_step(solver: str, steps: int) -> None:
    for grid in ("trailing", "karras"):
        assert calls("sd15", Solver(solver=solver, grid=grid), steps) == steps


@pytest.mark.pipe
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image_evaluates_the_nodes_that_are_left(strength: float) -> None:
    """Six of ten at strength .6: two without a history, then the ratios of the grid's own nodes."""
    ratios = [1.0, 1.0, *[0.9, 1.1] * 4]
    for plugged in (DCSolver(ratios), Solver(solver="ipndm")):
        assert calls("sd15-img2img", plugged, 10, strength=strength) == round(10 * strength)


@pytest.mark.pipe
def test_image_to_image_applies_the_ratios_of_the_nodes_it_passes() -> None:
    pipe = tiny("sd15-img2img")
    options = tiny.inputs("sd15-img2img", num_inference_steps=10, output_type="latent", strength=0.6)

    def latents(ratios: list[float] | None) -> torch.Tensor:
        with plug(pipe, DCSolver(ratios)):
            return torch.as_tensor(pipe(**options, generator=torch.Generator().manual_seed(0))[0])

    early, late = [1.0] * 10, [1.0] * 10
    early[4], early[5], late[6] = 0.5, 1.5, 0.5  # nodes 4 and 5 are the first two of this run
    assert torch.equal(latents(early), latents(None))
    assert not torch.equal(latents(late), latents(None))


@pytest.mark.pipe
def test_a_search_tells_what_it_cost(tmp_path: Path) -> None:
    """The evaluations that it reports are forward passes of the network, and so are those it is told of."""
    pipe, seen, told = tiny("sd15"), [], []
    own = pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return own(*args, **kwargs)

    pipe.unet.forward = forward
    found = search_compensation(
        pipe, PROMPTS, 3, rungs=("ratios",), truth_steps=6, options=SMALL, cache=tmp_path, tail=3,
        on_evaluation=lambda: told.append(1),
    )  # fmt: skip
    assert found.schedule.meta["network calls"] == len(seen) == len(told) > 2 * 6
    assert found.schedule.meta["guidance_scale"] == 7.5  # the pipeline's own
    assert sum(stage.evaluations for stage in found.stages) < len(
        seen
    )  # truths and stock solvers come before


@pytest.mark.pipe
def test_secret_ratios_are_found_through_a_pipeline(tmp_path: Path) -> None:
    """The truth is a DC-Solver run of the same pipeline: the search gives its ratio back."""
    from diffplug.rollout import Rollouts
    from diffplug.samplers.schedule.nodes import Nodes
    from diffplug.samplers.search import fits
    from diffplug.samplers.search.pipeline_problem import PipelineProblem

    pipe, secret = tiny("sd15"), [1.0, 1.0, 0.8, 1.3]
    nodes = Nodes(kind="name", name="linspace", final="sigma_min")
    trials = Rollouts(pipe, PROMPTS, [0, 1, 2, 3], 4, 3.0, SMALL)
    problem = PipelineProblem(trials, nodes, cache=tmp_path)
    run = trials.trajectory(DCSolverScheduler.from_config(pipe.scheduler.config, **RECIPE, dc_ratios=secret))
    states = torch.cat([run.corrected, run.final[None]]).reshape(5, 4, -1).numpy()  # type: ignore[index]
    problem.__dict__["reference"] = states[-1]
    problem.reference_states = lambda schedule: states  # type: ignore[method-assign]
    with trials.remembering():
        plain = presets.unipc(4, nodes, disable_corrector=(0,))
        found = fits.ratios(problem, plain, iterations=4)
    assert found.ratios == pytest.approx(secret, abs=5e-3)


RECIPE = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min", "disable_corrector": [0]}
