"""ImageThenVideo: the picture is the picture pipeline's, the clip is the video pipeline's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import video_pipelines as made

from diffplug.recipe import Recipe
from diffplug.samplers.video.chain import ImageThenVideo
from diffplug.samplers.video.hand_over import hand_over
from diffplug.samplers.video.long_video import LongVideo
from diffplug.testing import tiny

VIDEO = {"num_frames": 9, **made.SMALL}


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def picture_of(pipe: Any, seed: int) -> torch.Tensor:
    call = {"prompt": "a", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0].float()


@pytest.mark.law
@pytest.mark.parametrize("keep", ["both", "one"])
def test_the_chain_is_the_two_calls(keep: str) -> None:
    t2i, i2v = tiny("sd15"), made.wan_i2v()
    steps = Recipe(steps=2)
    found = ImageThenVideo(t2i, i2v, picture=steps, keep=keep)("a", seed=7, **VIDEO)
    assert torch.equal(found.image, picture_of(t2i, 7))
    call = {**made.SMALL, "prompt": "a", "generator": torch.Generator().manual_seed(7)}
    assert torch.equal(found.frames, hand_over(i2v).clip(found.image[None], 9, call))
    assert found.seed == 7


@pytest.mark.law
def test_pictures_are_chosen_before_any_clip_is_made() -> None:
    t2i, i2v = tiny("sd15"), made.wan_i2v()
    calls: list[int] = []
    i2v.transformer.register_forward_hook(lambda *_: calls.append(1))
    chain = ImageThenVideo(t2i, i2v, picture="steps=2", pictures=4, reward=brightness)
    found = chain("a", seed=3, **VIDEO)
    one = len(calls)
    pictures = [picture_of(t2i, seed) for seed in range(3, 7)]
    rewards = [float(brightness(p[None], [""])) for p in pictures]
    best = max(range(4), key=rewards.__getitem__)
    assert found.rewards == pytest.approx(rewards)
    assert found.seed == 3 + best
    assert torch.equal(found.image, pictures[best])
    calls.clear()
    several = ImageThenVideo(t2i, i2v, picture="steps=2", pictures=4, clips=2, reward=brightness)
    several("a", seed=3, **VIDEO)
    assert len(calls) == 2 * one


@pytest.mark.law
def test_the_motion_prompt_goes_to_the_video_alone() -> None:
    t2i, i2v = tiny("sd15"), made.wan_i2v()
    seen: list[str] = []
    encode = i2v.encode_prompt
    i2v.encode_prompt = lambda **kwargs: (seen.append(kwargs["prompt"]), encode(**kwargs))[1]
    found = ImageThenVideo(t2i, i2v, picture="steps=2")("a", motion_prompt="b", seed=1, **VIDEO)
    assert seen == ["b"]
    assert torch.equal(found.image, picture_of(t2i, 1))


@pytest.mark.pipe
def test_a_picture_can_begin_a_long_video() -> None:
    long = LongVideo(made.wan_i2v(), frames=20, clip_frames=9)
    small = {key: value for key, value in VIDEO.items() if key != "num_frames"}
    found = ImageThenVideo(tiny("sd15"), long, picture="steps=2")("a", **small)
    assert len(found.frames) == 20
    assert len(found.report.joins) == 2


@pytest.mark.law
def test_the_picture_has_the_videos_size_and_is_not_stretched() -> None:
    t2i, i2v = tiny("sd15"), made.wan_i2v()
    asked: list[tuple[int, int]] = []
    encode = t2i.prepare_latents

    def prepared(n: int, channels: int, height: int, width: int, *rest: Any) -> Any:
        asked.append((height, width))
        return encode(n, channels, height, width, *rest)

    t2i.prepare_latents = prepared
    call = {**VIDEO, "height": 35, "width": 52}
    found = ImageThenVideo(t2i, i2v, picture="steps=2")("a", **call)
    assert asked == [(32, 48)]
    assert found.image.shape == (3, 32, 48)
    assert found.frames.shape[-2:] == (32, 48)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pictures": 0}, "pictures=0"),
        ({"pictures": 4}, "give reward="),
        ({"reward": brightness}, "pictures=2 or more"),
        ({"pictures": 2, "clips": 3, "reward": brightness}, "not as many"),
        ({"keep": "none"}, "'both' or 'one'"),
        ({"picture": "steps=0"}, "steps"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ImageThenVideo(tiny("sd15"), made.wan_i2v(), **options)


def test_calls_that_do_not_fit_are_refused_before_the_picture() -> None:
    chain = ImageThenVideo(tiny("sd15"), made.wan_i2v())
    for call, told in [
        ({"height": 16}, "height and width together"),
        ({"height": 4, "width": 16}, "multiples of 16"),
        ({"seed": -1}, "seed"),
    ]:
        with pytest.raises(ValueError, match=told):
            chain("a", **call)
    with pytest.raises(ValueError, match="one text"):
        chain(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no first frames"):
        ImageThenVideo(tiny("sd15"), tiny("wan"))
