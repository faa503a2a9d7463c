"""What a clip leaves to the next beside frames: embeddings of an anchor, and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import video_pipelines as plain
from first_frame_pipelines import KINDS, built
from torch import Tensor

from diffplug.samplers.video.long_video import LongVideo
from diffplug.samplers.video.video_folder import VideoFolder
from diffplug.steering import ClipSelection
from diffplug.testing import tiny

FRAMES = 25
SMALL = {"image": plain.picture(), "prompt": "a", **plain.SMALL}


def with_latents(**options: Any) -> tuple[LongVideo, dict[str, Any]]:
    return LongVideo(plain.wan_ti2v(), frames=17, overlap=5, clip_frames=9, **options), SMALL


def with_anchor(**options: Any) -> tuple[LongVideo, dict[str, Any]]:
    return LongVideo(plain.wan_i2v(), frames=FRAMES, clip_frames=9, anchor="embeds", **options), SMALL


def svd_with_anchor(**options: Any) -> tuple[LongVideo, dict[str, Any]]:
    call = {"image": plain.picture(), "height": 16, "width": 16, "num_inference_steps": 2}
    return LongVideo(tiny("svd"), frames=10, clip_frames=4, anchor="embeds", **options), call


def hunyuan15_with_anchor(**options: Any) -> tuple[LongVideo, dict[str, Any]]:
    kind = KINDS["hunyuan15-i2v"]
    return LongVideo(built(kind), frames=FRAMES, clip_frames=9, anchor="embeds", **options), kind.call()


ALL = [with_latents, with_anchor, svd_with_anchor, hunyuan15_with_anchor]


def kill_after(monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    """Make the writing of frames stop for good after so many of them."""
    import diffplug.samplers.video.video_folder as folder

    write, left = folder.atomic_write, [frames]

    def failing(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(folder, "atomic_write", failing)


def pixels(folder: Path, frames: int) -> list[bytes]:
    place = VideoFolder(folder)
    assert not place.frame(frames).exists()
    return [place.frame(i).read_bytes() for i in range(frames)]


@pytest.mark.law
@pytest.mark.parametrize("setting", ALL)
@pytest.mark.parametrize("clips", [0, 1, 2])
def test_a_killed_video_is_resumed_by_another_pipeline_to_the_same_bits(
    setting: Any, clips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first, second and third clip, and gone on with by an object that saw none of it."""
    long, call = setting()
    report = long.write(tmp_path / "whole", seed=5, **call)
    fresh = long.clip_frames - long.overlap
    with monkeypatch.context() as broken:
        kill_after(broken, long.clip_frames + (clips - 1) * fresh + 2 if clips else 2)
        with pytest.raises(KeyboardInterrupt):
            long.write(tmp_path / "killed", seed=5, **call)
    resumed = setting()[0].write(tmp_path / "killed", seed=5, **call)
    assert pixels(tmp_path / "whole", long.length) == pixels(tmp_path / "killed", long.length)
    assert resumed.clips == report.clips
    assert resumed.joins == report.joins
    assert len(list((tmp_path / "killed").glob("tail-*"))) == 1


@pytest.mark.law
@pytest.mark.parametrize("setting", [with_latents, with_anchor])
def test_what_is_carried_matters(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it lost in the folder, other frames would come: the test above could fail."""
    long, call = setting()
    long.write(tmp_path / "whole", seed=5, **call)
    with monkeypatch.context() as broken:
        kill_after(broken, long.clip_frames + 2)
        with pytest.raises(KeyboardInterrupt):
            long.write(tmp_path / "killed", seed=5, **call)
    change_carried(tmp_path / "killed", lambda value: -value)
    long.write(tmp_path / "killed", seed=5, **call)
    whole, killed = (pixels(tmp_path / name, long.length) for name in ("whole", "killed"))
    assert whole[: long.clip_frames] == killed[: long.clip_frames]
    assert whole != killed


def change_carried(folder: Path, change: Any) -> None:
    """Change every carried tensor of a folder; None takes it away."""
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("tail-*"))
    kept = load_file(file)
    changed = {name: value if name in ("tail", "first") else change(value) for name, value in kept.items()}
    save_file({name: value for name, value in changed.items() if value is not None}, file)


@pytest.mark.parametrize(("setting", "name"), [(with_latents, "latents"), (with_anchor, "embeddings")])
def test_a_folder_without_them_is_refused_before_any_work(
    setting: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, call = setting()
    with monkeypatch.context() as broken:
        kill_after(broken, long.clip_frames + 2)
        with pytest.raises(KeyboardInterrupt):
            long.write(tmp_path / "v", seed=5, **call)
    change_carried(tmp_path / "v", lambda value: None)
    calls: list[int] = []
    long.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"kept no {name}.*take another folder"):
        long.write(tmp_path / "v", seed=5, **call)
    assert not calls


@pytest.mark.law
@pytest.mark.parametrize("setting", [with_latents, with_anchor])
def test_two_videos_side_by_side_do_not_mix(setting: Any) -> None:
    long, call = setting()
    other = {**call, "image": 1 - call["image"]}
    one, two = long(seed=1, **call).frames, long(seed=2, **other).frames
    pairs = [*zip(long.frames(seed=1, **call), long.frames(seed=2, **other), strict=True)]
    assert torch.equal(torch.stack([pair[0] for pair in pairs]), one)
    assert torch.equal(torch.stack([pair[1] for pair in pairs]), two)


@pytest.mark.law
@pytest.mark.parametrize("best", [0, 1])
def test_a_chosen_clip_is_continued_from_its_own_latents(best: int) -> None:
    """Candidate 0 of every clip has the seed of the plain video, so that choosing it changes nothing."""

    class Always:
        candidates = 2
        compare_with = begin = staticmethod(lambda _: None)
        state = staticmethod(dict)

        def choose(self, clips: list[Tensor], prompt: str, seed: int) -> tuple[int, list[float]]:
            return best, [0.0, 0.0]

    long, call = with_latents()
    chosen = with_latents(select=Always())[0](seed=1, **call).frames
    assert torch.equal(chosen, long(seed=1, **call).frames) == (best == 0)


def test_selection_by_a_reward_goes_with_latents(tmp_path: Path) -> None:
    long, call = with_latents(select=ClipSelection("steady", candidates=2))
    report = long.write(tmp_path / "v", seed=1, **call)
    assert [len(row) for row in report.rewards] == [2, 2, 2]


def test_matching_colours_of_pixels_does_not_go_with_latents() -> None:
    """The clips shown were moved, those gone on from were not, so that joins grew worse."""
    told = {"frames": 17, "clip_frames": 9, "match": "prefix"}
    with pytest.raises(ValueError, match=r"match='prefix' moves .* pixels.*overlap=1"):
        LongVideo(plain.wan_ti2v(), overlap=5, **told)
    assert LongVideo(plain.wan_ti2v(), overlap=1, **told).match == "prefix"
