"""Windows: the laws of fusing, on tiny random networks of every kind that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import video_pipelines as made
from diffusers import AnimateDiffVideoToVideoPipeline
from torch import nn

from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.samplers.video.free_noise import frame_order
from diffplug.samplers.video.network_axes import NETWORKS, Axes, VideoCall
from diffplug.samplers.video.window_plan import latents_of, plan, temporal_compression, window_weights
from diffplug.samplers.video.windows import Windows, windowed
from diffplug.testing import tiny

FAMILIES = {
    "wan": (9, 0, 33),
    "wan22": (9, 4, 33),
    "ltx": (17, 8, 57),
    "cogvideox": (9, 4, 33),
    "animatediff": (4, 2, 8),
}


def call(name: str, pipe: Any, frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    arguments = tiny.inputs(name, num_frames=frames, generator=generator, output_type="latent")
    return pipe(**arguments).frames


@pytest.mark.law
@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_as_long_as_the_video_changes_no_bit(name: str) -> None:
    pipe, (window, overlap, _) = tiny(name), FAMILIES[name]
    network = getattr(pipe, "transformer", None) or pipe.unet
    before, kinds = call(name, pipe, window), (type(pipe), type(network), set(vars(network)))
    idle = pytest.warns(UserWarning, match=f"does nothing for {window} frames, which fit into one")
    with plug(pipe, Windows(frames=window, overlap=overlap)), idle:
        inside = call(name, pipe, window)
    assert torch.equal(inside, before)
    assert (type(pipe), type(network), set(vars(network))) == kinds
    assert torch.equal(call(name, pipe, window), before)


@pytest.mark.law
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_call_has_a_windows_frames_and_there_are_n_times_as_many(name: str) -> None:
    pipe, (window, overlap, frames) = tiny(name), FAMILIES[name]
    ratio = temporal_compression(pipe)
    length = latents_of(frames, ratio, "frames")
    size = latents_of(window, ratio, "window")
    expected = len(plan(length, size, overlap // ratio))
    steps = 2 if name == "animatediff" else 0  # its motion modules end at 8 frames: no plain run to count
    if not steps:
        with count_network(pipe) as plain:
            call(name, pipe, frames)
        steps = plain.calls
    calls: list[int] = []
    undo = _spied(pipe, calls)
    try:
        with plug(pipe, Windows(frames=window, overlap=overlap)):
            call(name, pipe, frames)
    finally:
        undo()
    assert set(calls) == {size}
    assert len(calls) == expected * steps


def _spied(pipe: Any, calls: list[int]) -> Any:
    """Note the frames of every call that reaches a network itself; windows attached later stand outside."""
    from diffplug.network.denoiser import denoisers, wrap_forward

    undos = []
    for network in denoisers(pipe):

        def around(forward: Any, *args: Any, network: Any = network, **kwargs: Any) -> Any:
            calls.append(VideoCall.of(network, args, kwargs).frames)
            return forward(*args, **kwargs)

        undos.append(wrap_forward(network, around))
    return lambda: [undo() for undo in reversed(undos)]


class PerFrame(nn.Module):
    """A network that treats every frame alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> Any:
        return (self.mix(hidden_states.movedim(1, -1)).tanh().movedim(-1, 1),)

    @property
    def config(self) -> Any:
        return type("Config", (dict,), {"out_channels": 3})()


@pytest.fixture
def per_frame(monkeypatch: pytest.MonkeyPatch) -> PerFrame:
    monkeypatch.setitem(NETWORKS, "PerFrame", Axes())
    torch.manual_seed(0)
    return PerFrame()


@pytest.mark.law
@pytest.mark.parametrize("weights", ["flat", "pyramid"])
@pytest.mark.parametrize(("length", "window", "overlap"), [(9, 4, 2), (10, 4, 3), (13, 5, 0), (26, 16, 12)])
def test_without_mixing_in_time_windows_give_the_whole_video(
    per_frame: PerFrame, length: int, window: int, overlap: int, weights: str
) -> None:
    x = torch.randn(2, 3, length, 2, 2)
    seen = VideoCall.of(per_frame, (x,), {})
    found = windowed(per_frame.forward, seen, window, overlap, weights)[0]
    assert torch.allclose(found, per_frame(x)[0], atol=1e-6)


@pytest.mark.law
@pytest.mark.parametrize("weights", ["flat", "pyramid"])
def test_weights_sum_to_one_at_every_frame_of_every_plan(per_frame: PerFrame, weights: str) -> None:
    def constant(hidden_states: torch.Tensor, **_: Any) -> Any:
        return (torch.full_like(hidden_states, 3.0),)

    for window in (1, 2, 3, 4, 7, 16):
        for overlap in range(window):
            for length in range(1, 41):
                assert all(length - s >= min(window, length) for s in plan(length, window, overlap))
                if length > window:
                    x = torch.zeros(1, 3, length, 1, 1)
                    found = windowed(constant, VideoCall.of(per_frame, (x,), {}), window, overlap, weights)[0]
                    assert torch.allclose(found, torch.full_like(x, 3.0), atol=1e-6)


@pytest.mark.law
def test_a_plan_has_no_short_window_and_n_of_them() -> None:
    for window in range(1, 12):
        for overlap in range(window):
            for length in range(1, 41):
                starts = plan(length, window, overlap)
                covered = (
                    {s + j for s in starts for j in range(window)} if length >= window else {*range(length)}
                )
                assert covered == {*range(length)}
                assert len(starts) == 1 + max(0, -(-(length - window) // (window - overlap)))
    assert window_weights(5, "pyramid").tolist() == [1, 2, 3, 2, 1]
    assert window_weights(4, "pyramid").tolist() == [1, 2, 2, 1]


@pytest.mark.law
def test_the_networks_largest_tensor_does_not_grow_with_the_video() -> None:
    pipe = tiny("wan")
    sizes: dict[int, int] = {}
    for frames in (17, 65, 125):
        largest = 0

        def note(module: Any, args: Any, output: Any) -> None:
            nonlocal largest
            values = output if isinstance(output, tuple) else (output,)
            largest = max([largest, *(v.numel() for v in values if isinstance(v, torch.Tensor))])

        hooks = [
            part.register_forward_hook(note)
            for part in pipe.transformer.modules()
            if part is not pipe.transformer
        ]
        with plug(pipe, Windows(frames=17, overlap=4)):
            call("wan", pipe, frames)
        for hook in hooks:
            hook.remove()
        sizes[frames] = largest
    assert len(set(sizes.values())) == 1


def bare_networks() -> list[Any]:
    wan = tiny("wan").transformer
    ltx = tiny("ltx").transformer
    cog = tiny("cogvideox").transformer
    motion = tiny("animatediff").unet
    svd = tiny("svd").unet
    torch.manual_seed(1)
    text = torch.randn(1, 5, 32)
    rotary = (torch.randn(9, 8), torch.randn(9, 8))
    return [
        pytest.param(
            (
                wan,
                {
                    "hidden_states": torch.randn(1, 16, 9, 2, 2),
                    "timestep": torch.tensor([500]),
                    "encoder_hidden_states": text,
                },
                2,
            ),
            id="wan",
        ),
        pytest.param(
            (
                wan,
                {
                    "hidden_states": torch.randn(1, 16, 9, 2, 2),
                    "timestep": torch.arange(9.0)[None] * 100,
                    "encoder_hidden_states": text,
                },
                2,
            ),
            id="wan-token-timesteps",
        ),
        pytest.param(
            (
                cog,
                {
                    "hidden_states": torch.randn(1, 9, 4, 2, 2),
                    "timestep": torch.tensor([500]),
                    "encoder_hidden_states": torch.randn(1, 16, 32),
                    "image_rotary_emb": rotary,
                },
                1,
            ),
            id="cogvideox",
        ),
        pytest.param(
            (
                ltx,
                {
                    "hidden_states": torch.randn(1, 36, 8),
                    "timestep": torch.tensor([500]),
                    "encoder_hidden_states": text,
                    "encoder_attention_mask": torch.ones(1, 5),
                    "num_frames": 9,
                    "height": 2,
                    "width": 2,
                },
                1,
            ),
            id="ltx",
        ),
        pytest.param(
            (
                motion,
                {
                    "sample": torch.randn(1, 4, 9, 8, 8),
                    "timestep": 500,
                    "encoder_hidden_states": torch.randn(9, 5, 32),
                },
                2,
            ),
            id="animatediff",
        ),
        pytest.param(
            (
                svd,
                {
                    "sample": torch.randn(1, 9, 8, 8, 8),
                    "timestep": torch.tensor(1.0),
                    "encoder_hidden_states": torch.randn(1, 1, 32),
                    "added_time_ids": torch.ones(1, 3),
                },
                1,
            ),
            id="svd",
        ),
        pytest.param(made.hunyuan(), id="hunyuan"),
        pytest.param(made.mochi(), id="mochi"),
        pytest.param(made.latte(), id="latte"),
    ]


def frames_of(x: torch.Tensor, axis: int, part: slice, packed: bool) -> torch.Tensor:
    if packed:
        return x.unflatten(1, (-1, 4))[:, part].flatten(1, 2)
    return x.narrow(axis, part.start, part.stop - part.start)


@pytest.mark.law
@pytest.mark.parametrize("network", bare_networks())
def test_the_frame_axis_of_every_network_is_the_right_one(network: tuple[Any, dict[str, Any], int]) -> None:
    """Separate windows are what separate calls give, and nothing of one is seen in the other."""
    module, arguments, axis = network
    sample = "sample" if "sample" in arguments else "hidden_states"
    packed = "num_frames" in arguments
    with torch.no_grad():
        seen = VideoCall.of(module, (), arguments)
        assert seen.frames == 9
        found = windowed(module.forward, seen, 3, 0)[0]
        changed = dict(arguments)
        x = arguments[sample].clone()
        frames_of(x, axis, slice(3, 6), packed).add_(1.0) if not packed else x.unflatten(1, (9, 4))[
            :, 3:6
        ].add_(1.0)
        changed[sample] = x
        other = windowed(module.forward, VideoCall.of(module, (), changed), 3, 0)[0]
    for start in (0, 3, 6):
        same = torch.equal(
            frames_of(found, axis, slice(start, start + 3), packed),
            frames_of(other, axis, slice(start, start + 3), packed),
        )
        assert same == (start != 3)


@pytest.mark.law
@pytest.mark.parametrize("network", bare_networks())
def test_swapped_windows_give_swapped_outputs(network: tuple[Any, dict[str, Any], int]) -> None:
    module, arguments, axis = network
    sample = "sample" if "sample" in arguments else "hidden_states"
    packed = "num_frames" in arguments
    order = [3, 4, 5, 0, 1, 2, 6, 7, 8]

    def swapped(x: torch.Tensor, axis: int = axis, per: int = 4 if packed else 0) -> torch.Tensor:
        if per:
            return x.unflatten(1, (9, per))[:, order].flatten(1, 2)
        return x.index_select(axis, torch.tensor(order))

    other = {**arguments, sample: swapped(arguments[sample])}
    if arguments["timestep"] is not None and getattr(arguments["timestep"], "ndim", 0) == 2:
        other["timestep"] = arguments["timestep"][:, order]
    if sample == "sample" and len(arguments["encoder_hidden_states"]) == 9:
        other["encoder_hidden_states"] = arguments["encoder_hidden_states"][order]
    with torch.no_grad():
        one = windowed(module.forward, VideoCall.of(module, (), arguments), 3, 0)[0]
        two = windowed(module.forward, VideoCall.of(module, (), other), 3, 0)[0]
    assert torch.allclose(swapped(one), two, atol=1e-5)


@pytest.mark.law
def test_free_noise_shuffles_the_block_a_window_earlier() -> None:
    for window, overlap, length in [(16, 12, 64), (16, 8, 61), (5, 1, 30), (7, 3, 8)]:
        order = frame_order(length, window, overlap, "free", torch.Generator().manual_seed(0))
        stride = window - overlap
        assert order[:window] == [*range(window)]
        for start in range(window, length, stride):
            block = order[start : start + stride]
            assert sorted(block) == sorted(order[start - window : start - window + len(block)])
        for start in plan(length, window, overlap):
            assert len({*order[start : start + window]}) == window  # no frame twice in a window
    assert frame_order(9, 4, 2, "repeat") == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.law
@pytest.mark.parametrize(("name", "axis"), [("wan", 2), ("cogvideox", 1), ("ltx", 1), ("animatediff", 2)])
def test_free_noise_of_a_pipeline_is_its_own_noise_rearranged(name: str, axis: int) -> None:
    pipe, (window, overlap, frames) = tiny(name), FAMILIES[name]
    ratio = temporal_compression(pipe)
    size, length = latents_of(window, ratio, ""), latents_of(frames, ratio, "")
    plain = _first_sample(name, pipe, frames)
    with plug(pipe, Windows(frames=window, overlap=overlap, noise="free")):
        first = _first_sample(name, pipe, frames)
        again = _first_sample(name, pipe, frames)
    with plug(pipe, Windows(frames=window, overlap=overlap)):
        untouched = _first_sample(name, pipe, frames)
    assert torch.equal(untouched, plain)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    x = first.unflatten(1, (length, -1)) if name == "ltx" else first
    y = plain.unflatten(1, (length, -1)) if name == "ltx" else plain
    assert torch.equal(x.narrow(axis, 0, size), y.narrow(axis, 0, size))
    for frame in range(size, length):
        wanted = x.select(axis, frame)
        assert any(torch.equal(wanted, y.select(axis, j)) for j in range(size))


def _first_sample(name: str, pipe: Any, frames: int) -> torch.Tensor:
    """The initial noise as the pipeline's scheduler first sees it."""
    from diffplug.intercept import StepCall, StepInterceptor, intercept_step

    found: list[torch.Tensor] = []

    class First(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            found.append(call.sample.clone())
            return call.run()

    undo = intercept_step(pipe.scheduler, First())
    try:
        call(name, pipe, frames)
    finally:
        undo()
    return found[0]


BAD = [
    ({"frames": 0, "overlap": 0}, "frames=0"),
    ({"frames": 16, "overlap": -1}, "overlap=-1"),
    ({"frames": 16, "overlap": 16}, "nothing new"),
    ({"frames": 16, "overlap": 4, "weights": "round"}, "pyramid"),
    ({"frames": 16, "overlap": 4, "noise": "fre"}, "free"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD)
def test_bad_settings_are_refused_at_once(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Windows(**arguments)


def test_lengths_that_do_not_fit_the_decoder_are_refused_with_both_neighbours() -> None:
    pipe = tiny("wan")
    with pytest.raises(ValueError, match=r"frames=.*\) 10 .* take 9 or 13"):
        plug(pipe, Windows(frames=10, overlap=4))
    with pytest.raises(ValueError, match="take 0 or 4"):
        plug(pipe, Windows(frames=9, overlap=2))
    with plug(pipe, Windows(frames=9, overlap=4)), pytest.raises(ValueError, match="num_frames 20"):
        call("wan", pipe, 20)


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*not guessed"):
        plug(tiny("sd15"), Windows(frames=4, overlap=0))


def test_feature_caches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("wan")
    monkeypatch.setattr(type(pipe.transformer), "is_cache_enabled", True)
    with pytest.raises(ValueError, match="disable_cache"):
        plug(pipe, Windows(frames=9, overlap=4))


def test_pictures_are_refused_unless_every_window_is_to_start_from_them() -> None:
    pipe = made.wan_i2v()
    told = {"image": made.picture(), "prompt": "a", "num_frames": 33, "output_type": "latent", **made.SMALL}
    with plug(pipe, Windows(frames=9, overlap=4)), pytest.raises(ValueError, match="LongVideo"):
        pipe(**told)
    shown: list[torch.Tensor] = []
    hook = pipe.transformer.patch_embedding.register_forward_pre_hook(lambda _, x: shown.append(x[0].clone()))
    with plug(pipe, Windows(frames=9, overlap=4, keep_first=True)):
        assert pipe(**told).frames.shape[2] == 9
    hook.remove()
    assert len({tuple(x[:, 16:, 0].flatten().tolist()) for x in shown}) == 1
    assert all(float(x[:, 16, 0].min()) == 1 for x in shown)  # the mask of the picture, in every window


@pytest.mark.parametrize("build", [made.wan_ti2v, made.ltx_i2v, lambda: tiny("wan")])
def test_a_picture_that_no_channel_shows_cannot_be_kept(build: Any) -> None:
    """Where the picture is the first latent, later windows never saw it, whatever keep_first said."""
    pipe = build()
    with pytest.raises(ValueError, match="keep_first=True\\) does nothing here"):
        plug(pipe, Windows(frames=9, overlap=0, keep_first=True))
    assert vars(pipe.transformer).get("forward") is None


def test_first_frames_of_a_conditioned_video_are_refused_by_either_name() -> None:
    pipe = made.ltx_condition()
    told = {"prompt": "a", "height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 2}
    with plug(pipe, Windows(frames=9, overlap=0)):
        for name, value in (("image", made.picture(32)), ("video", [made.picture(32)] * 9)):
            with pytest.raises(ValueError, match="first window only") as refusal:
                pipe(**told, **{name: value})
            assert "keep_first" not in str(refusal.value)


def test_noise_of_a_video_to_be_changed_is_not_rearranged() -> None:
    parts = tiny("animatediff").components
    pipe = AnimateDiffVideoToVideoPipeline(**parts)
    told = {"prompt": "a", "video": [made.picture()] * 6, "height": 16, "width": 16, "num_inference_steps": 2}
    with (
        plug(pipe, Windows(frames=4, overlap=2, noise="free")),
        pytest.raises(ValueError, match="would shuffle the frames of the video"),
    ):
        pipe(**told)


def test_latents_beside_rearranged_noise_are_refused() -> None:
    pipe = tiny("wan")
    with plug(pipe, Windows(frames=9, overlap=4, noise="free")), pytest.raises(ValueError, match="latents="):
        pipe(**tiny.inputs("wan", num_frames=33, latents=torch.zeros(1, 16, 9, 2, 2)))


def test_two_windows_on_one_pipeline_contradict_each_other() -> None:
    windows = Windows(frames=9, overlap=4)
    with pytest.raises(ValueError, match="windows"):
        plug(tiny("wan"), windows, windows)


@pytest.mark.pipe
def test_stable_video_diffusion_shows_every_window_its_picture_when_asked() -> None:
    pipe = tiny("svd")
    told = tiny.inputs("svd", num_frames=7, output_type="latent")
    with plug(pipe, Windows(frames=3, overlap=1)), pytest.raises(ValueError, match="keep_first"):
        pipe(**told)
    with plug(pipe, Windows(frames=3, overlap=1, keep_first=True)):
        assert pipe(**told, generator=torch.Generator().manual_seed(0)).frames.shape[1] == 7
