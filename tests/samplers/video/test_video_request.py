"""What makes two requests for a video folder the same one, and what makes them two."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

import diffplug
from diffplug.intercept import intercept_call
from diffplug.samplers import FewStep
from diffplug.samplers.negative import NAG, NegativeGuidance, SpeedUpNet
from diffplug.samplers.video import LongVideo
from diffplug.samplers.video.request import described, sampled_by


class Judge:
    """A reward that is an object; its repr has an address in it."""

    def __call__(self, pictures: Any, prompts: Any) -> Any:
        return pictures.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = diffplug.load("moving-shapes")
    found.set_progress_bar_config(disable=True)
    return found


def test_large_arrays_are_told_apart() -> None:
    one, two = np.zeros((2, 64, 64, 3)), np.zeros((2, 64, 64, 3))
    two[1, 30, 30] = 1.0  # repr would leave it out
    assert described(one) == described(one.copy())
    assert described(one) != described(two)


def test_objects_are_the_same_in_every_process() -> None:
    assert described([Judge()]) == described([Judge()])
    assert " at 0x" not in described(Judge())


def test_another_scheduler_or_shift_is_another_request(pipe: Any) -> None:
    usual = sampled_by(pipe)
    assert usual == sampled_by(pipe)
    with diffplug.plug(pipe, UniPCMultistepScheduler):
        assert sampled_by(pipe) != usual
    assert sampled_by(pipe) == usual
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.5)
    with diffplug.plug(pipe, other):
        assert sampled_by(pipe) != usual


def test_a_folder_of_another_sampler_is_refused(pipe: Any, tmp_path: Path) -> None:
    """A finished video of another sampler was handed out as the one that was asked for."""
    long = LongVideo(pipe, frames=3, overlap=1)
    long.write(tmp_path / "v", "a red circle", num_inference_steps=1)
    long.write(tmp_path / "v", "a red circle", num_inference_steps=1)
    with (
        diffplug.plug(pipe, UniPCMultistepScheduler),
        pytest.raises(ValueError, match=r"holds another video \(sampler: .*take another folder"),
    ):
        long.write(tmp_path / "v", "a red circle", num_inference_steps=1)


def test_an_unknown_argument_is_refused_before_the_folder_is_made(pipe: Any, tmp_path: Path) -> None:
    long = LongVideo(pipe, frames=3, overlap=1)
    with pytest.raises(ValueError, match="MovingShapesPipeline takes no bogus: leave it out"):
        long.write(tmp_path / "v", "a red circle", bogus=1)
    assert not (tmp_path / "v").exists()


def test_a_request_that_failed_before_its_first_frame_leaves_the_folder_free(
    pipe: Any, tmp_path: Path
) -> None:
    long = LongVideo(pipe, frames=3, overlap=1)
    with pytest.raises(ValueError, match="one clip at a time"):
        long.write(tmp_path / "v", "a red circle", num_inference_steps=1, num_videos_per_prompt=2)
    long.write(tmp_path / "v", "a red circle", num_inference_steps=1)
    assert len(list((tmp_path / "v" / "frames").glob("*.png"))) == 3
    with pytest.raises(ValueError, match="holds another video"):
        long.write(tmp_path / "v", "a blue square", num_inference_steps=1)


def test_a_plug_may_take_arguments_that_the_pipeline_does_not(pipe: Any) -> None:
    class Takes:
        def attach(self, pipe: Any) -> Any:
            def without(call: Any, kwargs: dict[str, Any]) -> Any:
                assert kwargs.pop("bogus") == 1
                return call(**kwargs)

            return intercept_call(pipe, without, takes=("bogus",))

    with diffplug.plug(pipe, Takes()):
        result = LongVideo(pipe, frames=3, overlap=1)("a red circle", num_inference_steps=1, bogus=1)
    assert len(result.frames) == 3


def test_a_negative_prompt_acts_on_every_clip_and_leaves_no_trace(pipe: Any) -> None:
    long = LongVideo(pipe, frames=18, overlap=4)

    def made(**call: Any) -> Any:
        return long("a red circle", num_inference_steps=1, **call).frames

    before = made()
    with diffplug.plug(pipe, NegativeGuidance("nag")):
        assert not torch.equal(made(negative_prompt="blue"), made(negative_prompt="a green cross"))
    assert torch.equal(made(), before)


def test_other_weights_in_the_same_folder_are_refused(pipe: Any, tmp_path: Path) -> None:
    """A fine-tune of the same class went on with the first model's clips, or got its finished video."""
    other = diffplug.sibling(pipe)
    other.transformer = deepcopy(pipe.transformer)
    LongVideo(pipe, frames=3, overlap=1).write(tmp_path / "v", "a red circle", num_inference_steps=1)
    LongVideo(other, frames=3, overlap=1).write(tmp_path / "v", "a red circle", num_inference_steps=1)
    with torch.no_grad():
        next(other.transformer.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match=r"holds another video \(weights: .* there, .* here\)"):
        LongVideo(other, frames=3, overlap=1).write(tmp_path / "v", "a red circle", num_inference_steps=1)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (NAG(strength=0.5), NAG(strength=2.0)),
        (NegativeGuidance("nag", scale=2.0), NegativeGuidance("nag", scale=4.0)),
        (NegativeGuidance("interval"), NegativeGuidance("interval", interval=(0.0, 0.2))),
        (SpeedUpNet("a.safetensors", guidance_scale=2), SpeedUpNet("a.safetensors", guidance_scale=5)),
        (FewStep("lcm", steps=4), FewStep("lcm", steps=4, guidance=2.0)),
    ],
)
def test_plugs_with_other_settings_are_told_apart(one: Any, two: Any) -> None:
    assert described(one) == described(one) != described(two)


def test_flat_pictures_of_other_sizes_are_told_apart() -> None:
    assert described(Image.new("RGB", (8, 4))) != described(Image.new("RGB", (4, 8)))
    assert described(torch.zeros(1, 3, 8, 4)) != described(torch.zeros(1, 3, 4, 8))
