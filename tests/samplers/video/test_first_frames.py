"""Every kind of pipeline that `LongVideo` continues, run for three clips on the real Diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import video_pipelines as plain
from first_frame_pipelines import KINDS, Kind, built, picture
from torch import Tensor

from diffplug.samplers.video import ImageThenVideo
from diffplug.samplers.video.clip_length import clip_frames_of
from diffplug.samplers.video.hand_over import hand_over
from diffplug.samplers.video.long_video import LongVideo
from diffplug.samplers.video.window_plan import temporal_compression
from diffplug.testing import tiny

SHORT = {"max_sequence_length": 16}
ALL = {
    **KINDS,
    "wan21-i2v": Kind(plain.wan_i2v, "image", 1, 9, told=SHORT),
    "wan22-ti2v": Kind(plain.wan_ti2v, "latents", 5, 9, told=SHORT),
    "wan-vace": Kind(plain.wan_vace, "vace", 5, 9, told={**SHORT, "image": None}),
    "ltx-i2v": Kind(plain.ltx_i2v, "image", 1, 17, size=32, told=SHORT),
    "ltx-condition": Kind(plain.ltx_condition, "ltx", 9, 17, size=32, told=SHORT),
    "svd": Kind(lambda: tiny("svd"), "image", 1, 4, ratio=1, told={"prompt": None}),
}
WITH_PICTURE = [name for name, kind in ALL.items() if kind.name in ("image", "latents")]
pytestmark = [pytest.mark.pipe]


@cache
def made(name: str) -> Any:
    return built(ALL[name])


def long_video(name: str, frames: int, **options: Any) -> LongVideo:
    kind = ALL[name]
    return LongVideo(made(name), frames=frames, overlap=kind.overlap, clip_frames=kind.clip, **options)


def one_clip(name: str, prefix: Tensor, seed: int = 3) -> Tensor:
    """Return a clip that continues `prefix`."""
    call = ALL[name].call()
    call.pop("image", None)
    pipe = made(name)
    adapter = hand_over(pipe)
    if ALL[name].name == "latents":
        adapter.clip(prefix[:1], ALL[name].clip, {**call, "generator": torch.Generator().manual_seed(1)})
    return adapter.clip(prefix, ALL[name].clip, {**call, "generator": torch.Generator().manual_seed(seed)})


def prefix_of(name: str) -> Tensor:
    kind = ALL[name]
    return torch.cat([picture(kind.size, seed) for seed in range(10, 10 + kind.overlap)])


@pytest.mark.parametrize("name", ALL)
def test_three_clips_are_as_long_as_asked_and_begin_as_shorter_videos_do(name: str) -> None:
    kind = ALL[name]
    whole = kind.clip + 2 * (kind.clip - kind.overlap)
    assert hand_over(made(name)).name == kind.name
    assert temporal_compression(made(name)) == kind.ratio
    long = long_video(name, whole)
    assert long.clips == 3
    result = long(seed=1, **kind.call())
    assert result.frames.shape == (whole, 3, kind.size, kind.size)
    assert len(result.report.joins) == 2
    assert bool(result.frames.isfinite().all())
    shorter = whole - kind.clip + kind.overlap - 1
    found = long_video(name, shorter)(seed=1, **kind.call()).frames
    assert torch.equal(found, result.frames[:shorter])
    other = long_video(name, kind.clip)(seed=2, **kind.call()).frames
    assert not torch.equal(other, found[: kind.clip])


@pytest.mark.parametrize("name", ALL)
def test_frames_handed_over_change_the_clip_that_continues_them(name: str) -> None:
    prefix = prefix_of(name)
    clip = one_clip(name, prefix)
    assert torch.equal(one_clip(name, prefix), clip)
    assert not torch.equal(one_clip(name, 1 - prefix), clip)
    if ALL[name].overlap > 1 and ALL[name].name != "latents":
        last = torch.cat([prefix[:-1], 1 - prefix[-1:]])
        assert not torch.equal(one_clip(name, last), clip)


@pytest.mark.parametrize("name", [name for name in ALL if name != "svd"])  # it adds noise before it encodes
def test_the_autoencoder_gets_the_float_frames_and_no_8_bit_copy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, prefix, seen = made(name), prefix_of(name), []
    encode = pipe.vae.encode

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(x.clone())
        return encode(x, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "encode", watched)
    one_clip(name, prefix)
    known = 1 if ALL[name].name == "latents" else len(prefix)
    wanted = (2 * prefix[:known] - 1).movedim(0, 1)[None]
    assert any(x.shape[2] >= known and torch.allclose(x[:, :, :known], wanted, atol=1e-6) for x in seen)


def eyes(pipe: Any) -> tuple[torch.nn.Module, Any]:
    """Return what looks at the picture, and the processor in front of it."""
    if hasattr(pipe, "feature_extractor"):
        return pipe.image_encoder, pipe.feature_extractor
    return getattr(pipe, "image_encoder", None) or pipe.text_encoder, pipe.image_processor


@pytest.mark.law
@pytest.mark.parametrize("name", ["wan21-i2v", "skyreels-i2v", "hunyuan-i2v", "hunyuan15-i2v"])
@pytest.mark.parametrize("handed", [True, False])
def test_encoders_see_the_picture_and_not_a_255th_of_it(name: str, handed: bool) -> None:
    """Their processors divide by 255 whatever they are given; in the first clip too."""
    from PIL import Image

    pipe, kind = made(name), ALL[name]
    grey = torch.full((1, 3, kind.size, kind.size), 200 / 255)
    encoder, processor = eyes(pipe)
    seen: list[Tensor] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["pixel_values"].clone())

    hook = encoder.register_forward_pre_hook(look, with_kwargs=True)
    call = {**kind.call(), "generator": torch.Generator().manual_seed(0), "image": grey}
    hand_over(pipe).clip(grey if handed else None, kind.clip, call)
    hook.remove()
    shown = Image.new("RGB", (kind.size, kind.size), (200, 200, 200))
    wanted = processor(images=shown, return_tensors="pt").pixel_values
    assert torch.allclose(seen[0], wanted, atol=1e-6)


@pytest.mark.law
def test_frames_that_a_pipeline_hides_are_asked_for_on_top() -> None:
    """HunyuanVideo's latent_concat leaves the first four out."""
    pipe = made("hunyuan-i2v-concat")
    assert clip_frames_of(pipe, None) == 125
    assert clip_frames_of(made("hunyuan-i2v"), None) == 129
    call = ALL["hunyuan-i2v-concat"].call()
    plainly = pipe(**call, num_frames=13, output_type="pt", generator=torch.Generator().manual_seed(4)).frames
    found = LongVideo(pipe, frames=9, clip_frames=9)(seed=4, **call).frames
    assert torch.equal(found, plainly[0].float().clamp(0, 1))


@pytest.mark.law
@pytest.mark.parametrize(
    ("name", "frames", "told"),
    [
        ("cogvideox-i2v", 13, "in pairs.*9 or 17"),
        ("cogvideox15-i2v", 5, "in pairs.*1 or 9"),
        ("kandinsky5-i2v", 13, "17 or more"),
        ("cosmos", 13, "latents stand for 8 frames: take 9 or 17"),
        ("sana-i2v", 10, "take 9 or 13"),
    ],
)
def test_lengths_that_a_pipeline_does_not_make_are_refused_before_any_work(
    name: str, frames: int, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        LongVideo(made(name), frames=40, clip_frames=frames)


@pytest.mark.law
def test_sanas_number_of_frames_is_its_own_by_default_and_cannot_be_overruled() -> None:
    assert LongVideo(made("sana-i2v"), frames=100).clip_frames == 81
    with pytest.raises(ValueError, match="frames= is decided"):
        long_video("sana-i2v", 20)(**ALL["sana-i2v"].call(), frames=5)


@pytest.mark.law
def test_prefixes_follow_each_models_temporal_compression() -> None:
    assert "continues 1, 9, 17" in hand_over(made("cosmos")).trouble(5)
    assert "continues 1, 5, 9" in hand_over(made("cosmos2")).trouble(4)
    assert hand_over(made("cosmos25")).trouble(9).endswith("continues 1, 5 frames")
    assert hand_over(made("sana-i2v")).trouble(5).endswith("continues 1 frame")


@pytest.mark.law
@pytest.mark.parametrize("name", [*WITH_PICTURE, "cosmos", "cosmos2"])
def test_models_that_need_a_picture_say_so_before_the_first_clip(name: str) -> None:
    call = ALL[name].call()
    call.pop("image")
    with pytest.raises(ValueError, match=r"needs a picture to begin with: give image="):
        long_video(name, 20).frames(**call)


@pytest.mark.law
def test_cosmos_25_begins_with_nothing_a_picture_tensor_or_a_video() -> None:
    """Alone it takes pictures as PIL only, and wants five frames of a video."""
    call = ALL["cosmos25"].call()
    image = call.pop("image")
    long = long_video("cosmos25", 9)
    free = long(seed=1, **call).frames
    with_picture = long(seed=1, image=image, **call).frames
    assert not torch.equal(free, with_picture)
    assert torch.equal(long(seed=1, video=image, **call).frames, with_picture)
    clip = torch.rand(5, 3, 32, 32)
    adapter = hand_over(made("cosmos25"))
    seeded = {**call, "generator": torch.Generator().manual_seed(1)}
    assert torch.equal(long(seed=1, video=clip[None], **call).frames, adapter.clip(clip, 9, seeded))


@pytest.mark.law
@pytest.mark.parametrize("name", ["sana-i2v", "hunyuan15-i2v", "cosmos25", "wan22-i2v"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_picture_drawn_first_begins_the_video(name: str, wrapped: bool) -> None:
    kind, film = ALL[name], long_video(name, 12) if wrapped else made(name)
    call = {key: value for key, value in kind.call().items() if key not in ("image", "prompt")}
    length = {} if wrapped else {"num_frames": kind.clip}
    found = ImageThenVideo(tiny("sd15"), film, picture="steps=2")("a", seed=1, **length, **call)
    assert len(found.frames) == (12 if wrapped else kind.clip)
    other = ImageThenVideo(tiny("sd15"), film, picture="steps=2")("a", seed=2, **length, **call)
    assert not torch.equal(found.frames, other.frames)


@pytest.mark.law
@pytest.mark.parametrize("name", ["cogvideox-i2v", "ltx-i2v", "ltx-condition", "svd", "wan22-ti2v"])
def test_a_float32_autoencoder_goes_with_a_half_precision_network(name: str) -> None:
    """The warning about half precision decoders recommends it; alone, four of these fail."""
    kind = ALL[name]
    pipe = built(kind).to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    long = LongVideo(pipe, frames=kind.clip + 1, overlap=kind.overlap, clip_frames=kind.clip)
    assert len(long(seed=1, **kind.call()).frames) == kind.clip + 1
    assert "encode" not in vars(pipe.vae)


@pytest.mark.law
def test_pixels_that_are_not_numbers_end_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = built(ALL["wan22-i2v"])
    decode: Callable[..., Any] = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0] * torch.nan,))
    with pytest.raises(ValueError, match="not numbers"):
        LongVideo(pipe, frames=9, clip_frames=9)(seed=1, **ALL["wan22-i2v"].call())


@pytest.mark.law
def test_embeddings_are_an_anchor_where_the_network_is_told_them() -> None:
    pipe = built(ALL["wan22-i2v"])
    with pytest.raises(ValueError, match="embeds no picture"):
        LongVideo(pipe, frames=20, clip_frames=9, anchor="embeds")
    pipe.image_encoder = made("wan21-i2v").image_encoder  # which this network never asks
    with pytest.raises(ValueError, match="embeds no picture"):
        LongVideo(pipe, frames=20, clip_frames=9, anchor="embeds")
    assert long_video("skyreels-i2v", 20, anchor="embeds").anchor == "embeds"


@pytest.mark.law
def test_a_pipeline_is_as_it_was_between_two_frames() -> None:
    """A generator that waits, or is dropped, leaves nothing on the pipeline."""
    pipe = made("wan21-i2v")
    before = set(vars(pipe))
    frames = long_video("wan21-i2v", 20, anchor="embeds").frames(**ALL["wan21-i2v"].call())
    next(frames)
    assert set(vars(pipe)) == before


def test_cosmos_transfer_loops_by_itself() -> None:
    transfer = type("Cosmos2_5_TransferPipeline", (), {"__call__": lambda self: None})()
    with pytest.raises(ValueError, match="num_frames of its own"):
        hand_over(transfer)
