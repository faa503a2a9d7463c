"""The students that come with the package: found by name, one row an evaluation, and mostly right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import diffplug
from diffplug.network.denoiser import count_network
from diffplug.samplers.few_step.lookup import students_folder
from diffplug.samplers.few_step.plug import FewStep
from diffplug.shapes import grade, sample_prompts


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = diffplug.load("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.pipe
@pytest.mark.parametrize(("steps", "least"), [(1, 0.3), (2, 0.6), (4, 0.8)])
def test_a_student_draws_in_its_evaluations_what_the_undistilled_model_cannot(
    pipe: Any, steps: int, least: float
) -> None:
    """Mean share of facts on 40 test prompts; without distillation it is .09, .21 and .55."""
    prompts = sample_prompts(40, seed=1, split="test")
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    with count_network(pipe) as count, diffplug.plug(pipe, FewStep("shapes", steps=steps)):
        images = pipe(prompts, generator=generators, num_inference_steps=steps).images
    assert (count.calls, count.rows) == (steps, 40 * steps)
    assert np.mean(grade(images, prompts).score) > least


@pytest.mark.pipe
def test_the_model_is_left_as_it_was(pipe: Any) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with diffplug.plug(pipe, FewStep("shapes", steps=2)):
        pipe("a red circle", num_inference_steps=2, output_type="latent")
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())


def test_steps_that_nobody_was_trained_for_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="3"), diffplug.plug(pipe, FewStep("shapes", steps=3)):
        pass


def test_students_are_small() -> None:
    assert sum(path.stat().st_size for path in students_folder().iterdir()) < 12 * 2**20
