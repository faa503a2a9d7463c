"""Outputs of every form turn into one tensor, and lose rows without changing their form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image

from diffplug.pictures import raw_pictures, score_pictures, to_tensor
from diffplug.steering.engine.outputs import take

IMAGES = torch.randint(0, 256, (3, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float() / 255
ARRAY = IMAGES.permute(0, 2, 3, 1).numpy()
PIL = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in ARRAY]


def test_every_form_is_the_same_tensor() -> None:
    for form in (IMAGES, ARRAY, PIL, list(ARRAY.transpose(0, 1, 2, 3)[:, None])):
        converted = to_tensor(form)
        torch.testing.assert_close(converted.reshape(IMAGES.shape), IMAGES)
        assert converted.dtype == torch.float32


def test_clips_keep_their_frames_and_grey_pictures_get_colour() -> None:
    assert to_tensor([PIL, PIL]).shape == (2, 3, 3, 4, 5)
    assert to_tensor(np.stack([ARRAY, ARRAY])).shape == (2, 3, 3, 4, 5)
    assert to_tensor(IMAGES[:, :1]).shape == (3, 3, 4, 5)


def test_rows_are_taken_from_whatever_has_them() -> None:
    output = StableDiffusionPipelineOutput(images=PIL, nsfw_content_detected=[False, True, False])
    taken = take(output, [2, 0], 3)
    assert type(taken) is StableDiffusionPipelineOutput
    assert taken.images == [PIL[2], PIL[0]]
    assert taken.nsfw_content_detected == [False, False]
    pictures, flags = take((ARRAY, None), [1], 3)
    assert np.array_equal(pictures, ARRAY[[1]])
    assert flags is None
    assert raw_pictures(output) is PIL


def test_an_output_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no images or frames"):
        raw_pictures(object())


def test_a_clip_is_worth_the_mean_of_its_frames() -> None:
    clips = torch.rand(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    seen: list[list[str]] = []

    def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append(prompts)
        return images.flatten(1).mean(1) if images.ndim == 4 else images.flatten(1).amax(1)

    torch.testing.assert_close(
        score_pictures(red, clips, ["a", "b"], takes_video=False), clips.flatten(1).mean(1)
    )
    torch.testing.assert_close(
        score_pictures(red, clips, ["a", "b"], takes_video=True), clips.flatten(1).amax(1)
    )
    assert seen == [["a"] * 4 + ["b"] * 4, ["a", "b"]]
