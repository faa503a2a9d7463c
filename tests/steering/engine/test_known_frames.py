"""Picture-to-video models under steering: clips are judged with the frames that were given."""

from __future__ import annotations

from typing import Any

import first_frame_pipelines as first
import pytest
import torch
import video_pipelines as plain

from diffplug import plug
from diffplug.latents import unpack
from diffplug.steering import BestOfN, FeynmanKac, Scoring


def ltx() -> tuple[Any, dict[str, Any]]:
    call = {"image": plain.picture(32), "height": 32, "width": 32, "num_frames": 17}
    return plain.ltx_i2v(), {**call, "prompt": "a", "num_inference_steps": 3}


def wan(pipe: Any) -> tuple[Any, dict[str, Any]]:
    call = {"image": plain.picture(), "prompt": "a", "num_frames": 9, **plain.SMALL}
    return pipe, {**call, "num_inference_steps": 3}


def kind(name: str) -> tuple[Any, dict[str, Any]]:
    found = first.KINDS[name]
    return first.built(found), {**found.call(), "num_inference_steps": 3}


GIVEN = {
    "ltx": ltx,
    "wan-ti2v": lambda: wan(plain.wan_ti2v()),
    "hunyuan": lambda: kind("hunyuan-i2v"),
    "sana": lambda: kind("sana-i2v"),
}
COUNTED = {
    "ltx": ltx,
    "wan": lambda: wan(plain.wan_i2v()),
    "skyreels": lambda: kind("skyreels-i2v"),
    "hunyuan-concat": lambda: kind("hunyuan-i2v-concat"),
    "sana": lambda: kind("sana-i2v"),
}


def brightness(clips: torch.Tensor, prompts: Any) -> torch.Tensor:
    return clips.flatten(1).mean(1)


brightness.takes_video = True  # type: ignore[attr-defined]


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.pipe
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_decoded_on_the_way_has_the_given_frame_and_the_clips_length(name: str) -> None:
    """The scheduler steps the other frames alone, or noise in the place of the first."""
    pipe, told = GIVEN[name]()
    seen: list[torch.Tensor] = []

    def decode(pipe: Any, x: torch.Tensor, *, batch_size: int, **size: Any) -> torch.Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), 1, 3, 8, 8)

    scoring = Scoring(at="every", decode=decode)
    steerer = FeynmanKac(brightness, particles=2, returns="all", scoring=scoring)
    with plug(pipe, steerer):
        latents = pipe(**told, output_type="latent", num_videos_per_prompt=2, generator=seeds(2)).frames
    size = [told.get(size) for size in ("num_frames", "height", "width")]
    ended = unpack(pipe, latents, *size)
    on_the_way = [x for x in seen if x.shape == ended.shape]
    assert len(on_the_way) == len(seen) >= 2
    for x in on_the_way:
        assert torch.allclose(x[:, :, 0], ended[:, :, 0], atol=1e-6)
        assert not torch.allclose(x[:, :, 1:], ended[:, :, 1:], atol=1e-3) or name == "wan-ti2v"
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.pipe
@pytest.mark.parametrize("name", COUNTED)
def test_particles_of_a_picture_are_the_pipelines_own_videos(name: str) -> None:
    """Several videos of one prompt fail in these pipelines: the prompt is given often instead."""
    pipe, told = COUNTED[name]()
    with plug(pipe, BestOfN(brightness, particles=2, returns="all")):
        both = pipe(**told, output_type="latent", num_videos_per_prompt=2, generator=seeds(2)).frames
    for i, row in enumerate(both):
        alone = pipe(**told, output_type="latent", generator=seeds(2)[i]).frames[0]
        assert torch.allclose(row, alone, atol=1e-4)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["hunyuan-i2v", "hunyuan-i2v-concat"])
def test_a_clip_on_the_way_is_as_long_as_the_finished_one(name: str) -> None:
    """With latent_concat HunyuanVideo makes four frames that it does not show."""
    pipe, told = kind(name)
    seen: list[int] = []

    def reward(clips: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append(clips.shape[1])
        return clips.flatten(1).mean(1)

    reward.takes_video = True  # type: ignore[attr-defined]
    with plug(pipe, FeynmanKac(reward, particles=2)):
        frames = pipe(**told, output_type="pt").frames
    assert set(seen) == {len(frames[0])} and len(seen) >= 2


@pytest.mark.parametrize("steerer", [FeynmanKac(brightness, particles=2), BestOfN(brightness, particles=2)])
def test_pipelines_that_step_twice_are_refused_before_any_work(steerer: Any) -> None:
    pipe = first.built(first.KINDS["cosmos"])
    with pytest.raises(ValueError, match="CosmosVideoToWorldPipeline cannot be steered: it steps .* twice"):
        plug(pipe, steerer)
