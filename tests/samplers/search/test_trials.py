"""Runs for searches: the same latents as the pipeline's own, paid for once, and a truth that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file

from diffplug.loading import load
from diffplug.network.cache import digest
from diffplug.network.denoiser import count_network
from diffplug.rollout import Rollouts
from diffplug.samplers import DCSolverScheduler
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.reference import fingerprint, reference_solution
from diffplug.seeds import generators
from diffplug.testing import tiny

PROMPTS = ["a red circle", "a blue square", "a green cross"]


SMALL = {"height": 16, "width": 16}


def trials(family: str = "sd15", steps: int = 4, **options: Any) -> Rollouts:
    return Rollouts(tiny(family), PROMPTS, [5, 6, 7], steps, guidance=3.0, options=SMALL, **options)


@pytest.mark.pipe
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_final_latents_are_the_pipeline_s_own(family: str) -> None:
    runs = trials(family)
    pipe = runs.pipe
    expected = pipe(
        prompt=PROMPTS, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=generators([5, 6, 7]), **SMALL,
    )[0]  # fmt: skip
    assert torch.equal(runs.final(pipe.scheduler), expected.double())
    with runs.remembering():
        assert torch.equal(runs.final(pipe.scheduler), expected.double())
        assert torch.equal(runs.final(pipe.scheduler), expected.double())
    assert (runs.network_cache.evaluated, runs.network_cache.recalled) == (4, 4)
    assert "forward" not in vars(pipe.components["unet" if family == "sd15" else "transformer"])


@pytest.mark.pipe
@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_compiled_networks_are_remembered(in_place: bool) -> None:
    runs = trials()
    plain = runs.final(runs.pipe.scheduler)
    if in_place:
        runs.pipe.unet.compile(backend="eager")
    else:
        runs.pipe.unet = torch.compile(runs.pipe.unet, backend="eager")
    with runs.remembering():
        torch.testing.assert_close(runs.final(runs.pipe.scheduler), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(runs.final(runs.pipe.scheduler), plain, rtol=0, atol=1e-5)
    assert (runs.network_cache.evaluated, runs.network_cache.recalled) == (4, 4)
    torch.testing.assert_close(runs.final(runs.pipe.scheduler), plain, rtol=0, atol=1e-5)


@pytest.mark.pipe
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_prompts_are_read_once(family: str) -> None:
    names = {"prompt", "num_inference_steps", "output_type"}
    options = {name: value for name, value in tiny.inputs(family).items() if name not in names}
    runs = Rollouts(tiny(family), PROMPTS[:2], [5, 6], 2, options=options)
    read: list[int] = []
    encoder = runs.pipe.text_encoder
    handle = encoder.register_forward_hook(lambda *_: read.append(1))
    plain = runs.final(runs.pipe.scheduler)
    once = len(read)
    with runs.remembering() as run:
        for _ in range(2):
            assert torch.equal(run.final(runs.pipe.scheduler), plain)
        assert run.evaluations == 2 * (2 if count_twice(family) else 1)
    handle.remove()
    assert once > 0 and len(read) == 2 * once and "encode_prompt" not in vars(runs.pipe)


def count_twice(family: str) -> bool:
    """Whether a guided step is two calls of the network."""
    return family == "wan"


@pytest.mark.pipe
def test_a_candidate_costs_only_what_differs() -> None:
    runs = trials(steps=5)

    def scheduler(*ratios: float) -> DCSolverScheduler:
        return DCSolverScheduler.from_config(runs.pipe.scheduler.config, dc_ratios=list(ratios))

    fresh = runs.final(scheduler(1, 1, 1, 0.8, 1))
    with runs.remembering() as run:
        run.final(scheduler(1, 1, 1, 1, 1))
        assert run.evaluations == 5
        assert torch.equal(run.final(scheduler(1, 1, 1, 0.8, 1)), fresh)
        assert run.evaluations == 6  # the last one; before it nothing has changed
        run.final(scheduler(1, 1, 1, 1, 1.2))
        assert run.evaluations == 6


@pytest.mark.pipe
def test_a_trajectory_is_what_the_solver_saw_and_can_be_stopped() -> None:
    runs = trials(steps=4, max_rows=2)
    scheduler = DCSolverScheduler.from_config(runs.pipe.scheduler.config, disable_corrector=[])
    with count_network(runs.pipe) as count:
        whole = runs.trajectory(scheduler)
    assert count.calls == 8 and whole.samples.shape[:2] == (4, 3)
    assert torch.equal(whole.final, runs.final(scheduler))
    assert torch.equal(whole.samples[0], whole.corrected[0])
    assert not torch.equal(whole.samples[1], whole.corrected[1])
    with count_network(runs.pipe) as count:
        part = runs.trajectory(scheduler, until=2)
    assert count.calls == 4 and part.final is None
    assert torch.equal(part.outputs, whole.outputs[:2])
    assert part.timesteps.tolist() == whole.timesteps[:2].tolist()
    assert type(scheduler) is DCSolverScheduler


def test_the_memory_is_bounded() -> None:
    runs = trials()
    with runs.remembering(limit=1) as run:
        run.final(run.pipe.scheduler)
        assert len(run.network_cache._kept) == 1
        run.final(run.pipe.scheduler)
        assert run.network_cache.recalled == 0


def test_the_forward_of_a_hook_is_given_back() -> None:
    runs = trials()
    own = runs.pipe.unet.forward
    runs.pipe.unet.forward = own
    with pytest.raises(RuntimeError, match="stop"), runs.remembering():
        raise RuntimeError("stop")
    assert vars(runs.pipe.unet)["forward"] is own


@pytest.mark.pipe
def test_the_truth_is_computed_once_and_tied_to_everything_it_depends_on(tmp_path: Path) -> None:
    runs = trials(steps=6)
    ddim = DDIMScheduler.from_config(runs.pipe.scheduler.config)
    first = reference_solution(runs, ddim, tmp_path)
    with count_network(runs.pipe) as count:
        assert torch.equal(reference_solution(runs, ddim, tmp_path), first)
    assert count.calls == 0
    reference_solution(runs, UniPCMultistepScheduler.from_config(runs.pipe.scheduler.config), tmp_path)
    reference_solution(
        Rollouts(runs.pipe, PROMPTS, [5, 6, 8], 6, guidance=3.0, options=SMALL), ddim, tmp_path
    )
    with torch.no_grad():
        runs.pipe.unet.conv_in.weight[0, 0, 0, 0] += 1
    reference_solution(runs, ddim, tmp_path)
    with torch.no_grad():
        next(runs.pipe.text_encoder.parameters()).add_(1)
    reference_solution(runs, ddim, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.pipe
def test_a_truth_is_found_again_by_another_process(tmp_path: Path) -> None:
    """Diffusers notes the settings that were not given, as a set is sorted: otherwise in every process."""
    runs = trials(steps=6)
    ddim = DDIMScheduler.from_config(runs.pipe.scheduler.config)
    reference_solution(runs, ddim, tmp_path)
    noted = list(ddim.config["_use_default_values"])
    assert len(noted) > 1
    ddim.register_to_config(_use_default_values=noted[::-1])
    reference_solution(runs, ddim, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_truth_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    runs = trials(steps=2)
    with torch.no_grad():
        runs.pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="of 2 evaluations gives latents that are not finite"):
        reference_solution(runs, runs.pipe.scheduler, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_element_of_an_input_counts() -> None:
    """A long tensor's text leaves out its middle, which a picture to start from may differ in."""
    one = torch.zeros(5000)
    two = one.clone()
    two[2500] = 1
    assert repr(one) == repr(two) and digest(one) != digest(two)
    assert digest({"a": [one, 1.5]}) == digest({"a": [one.clone(), 1.5]}) != digest({"a": [one, 2.5]})


def test_a_damaged_truth_is_refused_and_left_alone(tmp_path: Path) -> None:
    runs = trials(steps=2)
    ddim = runs.pipe.scheduler
    reference_solution(runs, ddim, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{path.name}.*cannot be read.*remove the file"):
        reference_solution(runs, ddim, tmp_path)
    assert path.read_bytes() == whole[:-7]
    save_file({"latents": torch.zeros(3, 4)}, path, metadata={"told": "{}"})
    with pytest.raises(ValueError, match=rf"{path.name}.*something else"):
        reference_solution(runs, ddim, tmp_path)


def test_prompts_and_seeds_must_match() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        Rollouts(None, ["a", "b"], [1], 4)


def test_the_fingerprint_belongs_to_the_weights() -> None:
    one, two = tiny("sd15"), tiny("sd15")
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.unet.conv_out.bias += 1
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.slow
def test_a_converged_run_of_few_evaluations_stays_near_under_guidance(tmp_path: Path) -> None:
    """Of 24 prompts the third order ends at a mean error of 4.6, and at 47 with 20 evaluations."""
    prompts = ["a red circle", "a blue square left of a green cross", "two yellow triangles", "a cross"]
    runs = Rollouts(load("shapes"), prompts, [0, 1, 2, 3], 5, guidance=5.0)
    ends = Nodes(kind="name", name="linspace", final="sigma_min")
    short, long = (PipelineProblem(runs, ends, fine=fine, cache=tmp_path).reference for fine in (30, 200))
    assert np.square(short - long).mean() < 0.3
