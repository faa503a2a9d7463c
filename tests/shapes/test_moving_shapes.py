"""Moving Shapes: motion by a formula, a grader that knows every frame, and the video pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import diffplug
from diffplug.samplers.video import LongVideo, Windows
from diffplug.shapes.moving import grade_video, render_video, sample_moving
from diffplug.shapes.moving.model import normalised, plain, shown_latents
from diffplug.shapes.moving.world import bounced, scene_at
from diffplug.shapes.world import IMAGE_SIZE


@pytest.mark.law
def test_objects_bounce_inside_the_picture_at_constant_speed() -> None:
    places = bounced(30 + 1.7 * np.arange(500), 8.0)
    low, high = 8 * 1.2 + 1, IMAGE_SIZE - 8 * 1.2 - 1
    assert places.min() >= low
    assert places.max() <= high
    steps = np.abs(np.diff(places))
    assert np.median(steps) == pytest.approx(1.7)
    assert (steps <= 1.7 + 1e-9).all()
    assert bounced(low - 3, 8.0) == pytest.approx(low + 3)


@pytest.mark.law
def test_two_objects_never_cover_each_other() -> None:
    for seed in range(20):
        moving = sample_moving(np.random.default_rng(seed), "two")
        for frame in range(0, 97, 3):
            a, b = scene_at(moving, frame).things
            assert np.hypot(a.x - b.x, a.y - b.y) >= (a.radius + b.radius) * 1.2


@pytest.mark.law
@pytest.mark.parametrize("kind", ["one", "two"])
def test_the_grader_finds_every_fact_and_path_of_a_rendering(kind: str) -> None:
    for seed in range(4):
        moving = sample_moving(np.random.default_rng(seed), kind)
        grades = grade_video(render_video(moving, 40))
        assert grades.mean == 1.0
        assert grades.steady > 0.97
        things = moving.scene.things
        true = np.array([[(t.x, t.y) for t in scene_at(moving, f).things] for f in range(40)]).swapaxes(0, 1)
        for path in grades.paths:
            nearest = min(np.abs(path - other).max() for other in true)
            assert nearest < 1.0
        speeds = sorted(np.hypot(*v) for v in moving.velocities)
        assert sorted(grades.speeds) == pytest.approx(speeds, abs=0.2)
        assert len(grades.facts) == 2 + 2 * len(things)


@pytest.mark.law
def test_the_grader_sees_what_a_video_loses() -> None:
    first, second = (render_video(sample_moving(np.random.default_rng(seed), "one"), 10) for seed in (1, 2))
    cut = grade_video(torch.cat([first, second]))
    assert cut.kept[:10].tolist() == [1.0] * 10
    assert cut.kept[10:].max() < 1.0
    stuttering = first[[0, 5, 1, 6, 2, 7, 3, 8, 4, 9]]
    assert grade_video(stuttering).steady < grade_video(first).steady
    with pytest.raises(ValueError, match="nothing to keep"):
        grade_video(torch.zeros(3, 3, 64, 64))


@pytest.mark.law
def test_shown_latents_repeat_the_last_known_frame() -> None:
    x = torch.arange(6.0).reshape(1, 1, 6, 1, 1).expand(3, 4, 6, 2, 2)
    shown = shown_latents(x, torch.tensor([0, 1, 4]))[:, 0, :, 0, 0]
    assert shown.tolist() == [[0] * 6, [0] * 6, [0, 1, 2, 3, 3, 3]]
    ones = shown_latents(x + 1, torch.tensor([0, 1, 4]))[:, 0, :, 0, 0]
    assert ones.tolist() == [[0] * 6, [1] * 6, [1, 2, 3, 4, 4, 4]]
    z = torch.randn(2, 4, 3, 2, 2)
    assert torch.allclose(plain(normalised(z)), z, atol=1e-6)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    found = diffplug.load("moving-shapes")
    found.set_progress_bar_config(disable=True)
    yield found


@pytest.mark.pipe
def test_the_pipeline_keeps_the_frames_and_the_background_that_it_is_given(pipe: Any) -> None:
    start = render_video(sample_moving(np.random.default_rng(12), "one"), 4)
    call = {"guidance_scale": 1.0, "num_inference_steps": 10, "output_type": "pt"}
    frames = pipe("", video=start, generator=torch.Generator().manual_seed(0), **call).frames[0]
    assert frames.shape == (16, 3, 64, 64)
    assert float((frames[:4] - start).abs().mean()) < 0.03
    grades = grade_video(torch.cat([start, frames[4:]]))
    assert grades.kept[:4].min() == 1.0
    assert float((frames[:, :, :4, :4] - start[0, :, :4, :4]).abs().mean()) < 0.05


@pytest.mark.pipe
def test_long_videos_and_windows_run_on_it(pipe: Any) -> None:
    call = {"guidance_scale": 1.0, "num_inference_steps": 2}
    long = LongVideo(pipe, frames=30)
    assert long.overlap == 4
    assert len(long("a red circle", **call).frames) == 30
    with diffplug.plug(pipe, Windows(frames=16, overlap=8, noise="free")):
        video = pipe("a red circle", num_frames=30, output_type="pt", **call).frames[0]
        assert len(video) == 30
        with pytest.raises(ValueError, match="LongVideo"):
            pipe("", num_frames=30, video=video[:4], **call)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"video": torch.zeros(3, 3, 64, 64)}, "continues 1 or 4"),
        ({"video": torch.zeros(4, 3, 32, 32)}, "shape"),
        ({"video": torch.zeros(4, 3, 64, 64), "num_frames": 4}, "fewer than num_frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"image": torch.zeros(1, 3, 64, 64), "video": torch.zeros(4, 3, 64, 64)}, "both given"),
        ({"latents": torch.zeros(1, 4, 3, 16, 16)}, "this call needs"),
    ],
)
def test_bad_calls_are_refused(pipe: Any, call: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pipe("a red circle", num_inference_steps=1, **call)
