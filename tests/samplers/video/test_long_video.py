"""LongVideo: which frames come out, with which seeds, and what a resumed video is made of."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import video_pipelines as made
from PIL import Image
from torch import Tensor

from diffplug.samplers.video.clip_loop import clip_seed
from diffplug.samplers.video.long_video import LongVideo
from diffplug.samplers.video.video_folder import VideoFolder
from diffplug.steering import ClipSelection
from diffplug.testing import tiny


class Counter:
    """A model whose video is prefix, then +1, +2, ...: exact whole numbers."""

    name = "count"

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.calls: list[dict[str, Any]] = []

    def trouble(self, prefix_frames: int) -> str:
        return ""

    def clip(self, prefix: Tensor | None, frames: int, arguments: dict[str, Any]) -> Tensor:
        self.seeds.append(arguments["generator"].initial_seed())
        self.calls.append(arguments)
        first = 0 if prefix is None else int(prefix[0, 0, 0, 0])
        return (torch.arange(frames) + first).float().reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def numbers(frames: Tensor) -> list[int]:
    return frames[:, 0, 0, 0].round().int().tolist()  # a cross-fade rounds


@pytest.mark.law
@pytest.mark.parametrize("seam", ["keep", "new", "fade"])
def test_frames_follow_each_other_without_repetition_or_gap(seam: str) -> None:
    for window, length in itertools.product(range(2, 12), (1, 2, 7, 11, 23, 40, 59)):
        for overlap in range(1, window):
            model = Counter()
            long = LongVideo(
                None, frames=length, clip_frames=window, overlap=overlap, seam=seam, hand_over=model
            )
            assert numbers(long("x").frames) == [*range(length)]
            clips = 1 + max(0, math.ceil((length - window) / (window - overlap)))
            assert len(model.seeds) == clips == long.clips


class Walk:
    """A model whose frames depend on the prefix and on the seed: a random walk."""

    name = "walk"

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def trouble(self, prefix_frames: int) -> str:
        return ""

    def clip(self, prefix: Tensor | None, frames: int, arguments: dict[str, Any]) -> Tensor:
        self.seeds.append(arguments["generator"].initial_seed())
        steps = 0.02 * torch.randn(frames, 3, 4, 4, generator=arguments["generator"])
        start = torch.full((1, 3, 4, 4), 0.5) if prefix is None else prefix[:1]
        walk = (start + steps.cumsum(0)).clamp(0, 1)
        return walk if prefix is None else torch.cat([prefix + 0.001, walk[len(prefix) :]]).clamp(0, 1)


@pytest.mark.law
@pytest.mark.parametrize("seam", ["keep", "new", "fade"])
@pytest.mark.parametrize("match", [None, "anchor", "prefix"])
def test_a_longer_video_begins_with_the_bits_of_a_shorter_one(seam: str, match: str | None) -> None:
    def video(length: int) -> Tensor:
        long = LongVideo(
            None, frames=length, clip_frames=6, overlap=2, seam=seam, match=match, hand_over=Walk()
        )
        return long("x", seed=3).frames

    whole = video(31)
    for length in range(1, 31):
        settled = length if seam == "keep" else max(0, length - 2)
        assert torch.equal(video(length)[:settled], whole[:settled])


@pytest.mark.law
def test_overlapping_frames_are_the_earlier_clips_bit_for_bit() -> None:
    model = Walk()
    long = LongVideo(None, frames=14, clip_frames=6, overlap=2, hand_over=model)
    frames = long("x").frames
    first = Walk().clip(None, 6, {"generator": torch.Generator().manual_seed(0)})
    assert torch.equal(frames[:6], first)
    faded = LongVideo(None, frames=14, clip_frames=6, overlap=2, seam="fade", hand_over=Walk())("x").frames
    assert torch.equal(faded[:4], first[:4])
    assert not torch.equal(faded[4:6], first[4:6])


@pytest.mark.law
def test_noise_of_a_clip_depends_on_the_seed_and_its_number_alone() -> None:
    def seeds(**options: Any) -> list[int]:
        model = Walk()
        LongVideo(None, frames=14, clip_frames=6, overlap=2, hand_over=model, **options)("x", seed=9)
        return model.seeds

    plain = seeds()
    assert plain == [9, clip_seed(9, 1), clip_seed(9, 2)]
    assert seeds(match="anchor") == seeds(seam="new") == plain
    selected = seeds(select=ClipSelection(lambda x, texts: x.mean((1, 2, 3)), candidates=3))
    assert selected[::3] == plain
    assert len(set(selected)) == len(selected)
    assert clip_seed(9, 0) == 9
    assert len({clip_seed(s, k, j) for s in range(4) for k in range(9) for j in range(4)}) == 4 * 9 * 4


@pytest.mark.law
def test_a_short_video_is_one_plain_call_bit_for_bit() -> None:
    pipe = made.wan_i2v()
    image = Image.fromarray((made.picture()[0].movedim(0, -1) * 255).byte().numpy())
    told = {"image": image, "prompt": "a", **made.SMALL}
    generator = torch.Generator().manual_seed(4)
    plain = pipe(**told, num_frames=9, generator=generator, output_type="pt").frames[0]
    for length in (9, 6):
        long = LongVideo(pipe, frames=length, clip_frames=9)
        assert long.clips == 1
        found = long(seed=4, **told).frames
        assert torch.equal(found, plain[:length].float())


@pytest.mark.law
def test_masked_video_keeps_the_prefix_and_frees_the_rest() -> None:
    from diffplug.samplers.video.hand_over import _as_masked_video

    prefix = torch.rand(5, 3, 4, 4)
    told = _as_masked_video(None, prefix, 13)
    assert torch.equal(told["video"][0, :5], prefix)
    assert bool((told["video"][0, 5:] == 0.5).all())
    assert told["mask"][0, :, 0, 0, 0].tolist() == [0.0] * 5 + [1.0] * 8


@pytest.mark.law
def test_an_anchor_shows_every_clip_the_first_pictures_embedding() -> None:
    pipe = made.wan_i2v()
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states_image"].clone()), with_kwargs=True
    )
    told = {"image": made.picture(), "prompt": "a", **made.SMALL}
    LongVideo(pipe, frames=20, clip_frames=9)(**told)
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 1
    seen.clear()
    LongVideo(pipe, frames=20, clip_frames=9, anchor="embeds")(**told)
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 1
    assert "encode_image" not in vars(pipe)


@pytest.mark.law
def test_one_scheduler_set_up_a_clip_and_the_same_steps_in_each() -> None:
    """Another tool runs another number of steps in its second window."""
    pipe, steps = made.wan_i2v(), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: steps.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    LongVideo(pipe, frames=25, clip_frames=9)(
        image=made.picture(), prompt="a", guidance_scale=1.0, **made.SMALL
    )
    assert steps == steps[:2] * 3


@pytest.mark.law
def test_prompts_hold_from_their_frame_on() -> None:
    model = Counter()
    long = LongVideo(None, frames=30, clip_frames=10, overlap=2, hand_over=model)
    long(prompts={0: "a", 11: "b", 18: "c"})
    # first new frames of the clips: 0, 10, 18, 26
    assert [call["prompt"] for call in model.calls] == ["a", "a", "c", "c"]
    model.calls.clear()
    long()
    assert all("prompt" not in call for call in model.calls)


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


@pytest.mark.law
@pytest.mark.parametrize("after", [0, 3, 6, 9, 13])
@pytest.mark.parametrize("seam", ["keep", "fade"])
def test_a_killed_video_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, seam: str
) -> None:
    def long() -> LongVideo:
        select = ClipSelection("steady", candidates=2)
        return LongVideo(
            None, frames=16, clip_frames=6, overlap=2, seam=seam, select=select, hand_over=Walk()
        )

    whole = long().write(tmp_path / "whole", "x", seed=5)
    with monkeypatch.context() as broken:
        kill_after(broken, after)
        with pytest.raises(KeyboardInterrupt):
            long().write(tmp_path / "killed", "x", seed=5)
    resumed = long().write(tmp_path / "killed", "x", seed=5)
    one, two = VideoFolder(tmp_path / "whole"), VideoFolder(tmp_path / "killed")
    assert all(one.frame(i).read_bytes() == two.frame(i).read_bytes() for i in range(16))
    assert not one.frame(16).exists()
    assert resumed.log_weight == whole.log_weight
    assert resumed.joins == whole.joins
    assert resumed.rewards == whole.rewards
    assert len(list((tmp_path / "killed").glob("tail-*"))) == 1


@pytest.mark.law
def test_a_finished_video_is_not_made_again(tmp_path: Path) -> None:
    model = Walk()
    long = LongVideo(None, frames=16, clip_frames=6, overlap=2, hand_over=model)
    long.write(tmp_path / "v", "x")
    calls = len(model.seeds)
    long.write(tmp_path / "v", "x")
    assert len(model.seeds) == calls


def test_a_folder_of_another_request_is_refused_with_what_differs(tmp_path: Path) -> None:
    def write(folder: str, length: int = 16, **arguments: Any) -> None:
        LongVideo(None, frames=length, clip_frames=6, overlap=2, hand_over=Walk()).write(
            tmp_path / folder, "x", **arguments
        )

    write("v", seed=1)
    with pytest.raises(ValueError, match=r"another video \(seed: 1 there, 2 here"):
        write("v", seed=2)
    with pytest.raises(ValueError, match="frames: 16 there, 20 here"):
        write("v", 20, seed=1)
    write("w", image=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="image: 'tensor"):
        write("w", image=torch.ones(1, 3, 4, 4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write("other")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda state: state["report"].pop("log_weight"),
        lambda state: state["report"]["clips"][0].pop("std"),
        lambda state: state["report"]["clips"][0].update(mean=[["a"], 0, 0]),
        lambda state: state["report"].update(notes=-1),
        lambda state: state.pop("clip"),
        lambda state: state.pop("emitted"),
    ],
)
def test_a_garbled_state_is_damaged(break_it: Any, tmp_path: Path) -> None:
    long = LongVideo(None, frames=16, clip_frames=6, overlap=2, hand_over=Walk())
    long.write(tmp_path / "v", "x")
    state = json.loads((tmp_path / "v" / "state.json").read_text())
    break_it(state)
    (tmp_path / "v" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"is damaged .*: remove it and start anew"):
        long.write(tmp_path / "v", "x")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    long = LongVideo(None, frames=16, clip_frames=6, overlap=2, hand_over=Walk())
    long.write(tmp_path / "v", "x")
    next((tmp_path / "v").glob("tail-*")).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        long.write(tmp_path / "v", "x")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"frames": 0}, "frames=0"),
        ({"frames": 20, "seam": "kep"}, "keep"),
        ({"frames": 20, "match": "first"}, "anchor"),
        ({"frames": 20, "match_strength": 0.5}, "acts only with match"),
        ({"frames": 20, "match": "anchor", "match_strength": 2.0}, "at most 1"),
        ({"frames": 20, "overlap": 6}, "nothing new"),
        ({"frames": 20, "anchor": "embeds"}, "embeds no picture"),
        ({"frames": 20, "anchor": "frame"}, "WanVACEPipeline"),
        ({"frames": 20, "overlap": 0}, "overlap=0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LongVideo(None, **{"clip_frames": 6, "overlap": 2, "hand_over": Walk(), **options})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "one seed"),
        ({"generator": torch.Generator()}, "generator="),
        ({"num_frames": 9}, "num_frames="),
        ({"prompts": {0: "a"}, "prompt": "b"}, "both given"),
        ({"prompts": {3: "a"}}, "beginning with 0"),
        ({"prompts": {0: "a", 99: "b"}}, "99 is no frame"),
        ({"prompts": {0: 5}}, "must be a text"),
        ({"prompt": ["a", "b"]}, "one text"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_clip(arguments: dict[str, Any], told: str) -> None:
    model = Walk()
    long = LongVideo(None, frames=16, clip_frames=6, overlap=2, hand_over=model)
    with pytest.raises(ValueError, match=told):
        long.frames(**arguments)
    assert not model.seeds


def test_pipelines_that_cannot_be_continued_are_refused() -> None:
    with pytest.raises(ValueError, match="takes no first frames"):
        LongVideo(tiny("wan"), frames=20)
    looping = type("HeliosPipeline", (), {"__call__": lambda self, num_frames=9: None})()
    with pytest.raises(ValueError, match="num_frames of its own"):
        LongVideo(looping, frames=20)
    with pytest.raises(ValueError, match=r"overlap=2: WanImageToVideoPipeline continues 1 frame"):
        LongVideo(made.wan_i2v(), frames=20, overlap=2)
    with pytest.raises(ValueError, match="clip_frames 10 does not fit"):
        LongVideo(made.wan_i2v(), frames=20, clip_frames=10)
    with pytest.raises(ValueError, match="needs a picture"):
        LongVideo(made.wan_i2v(), frames=20)("a")


def test_a_prefix_of_another_size_is_refused() -> None:
    class Growing(Walk):
        def clip(self, prefix: Tensor | None, frames: int, arguments: dict[str, Any]) -> Tensor:
            return torch.zeros(frames, 3, 4, 4 if prefix is None else 8)

    with pytest.raises(ValueError, match="give the call height and width"):
        LongVideo(None, frames=16, clip_frames=6, overlap=2, hand_over=Growing())("x")


def test_a_half_precision_decoder_is_warned_of() -> None:
    pipe = made.wan_i2v()
    pipe.vae.half()
    with pytest.warns(UserWarning, match="colours run away"):
        LongVideo(pipe, frames=20, clip_frames=9)
