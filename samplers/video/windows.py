"""Windows: a text-to-video model on more frames than it knows, its windows averaged at every network call.

    with plug(pipe, Windows(frames=81, overlap=16, noise="free")):
        video = pipe(prompt, num_frames=241).frames

The network never sees another length than the one it was trained for: it is evaluated on windows of the long
latent, and the outputs are averaged where windows overlap (MultiDiffusion in time, arXiv 2302.08113). There
is one scheduler and one history. What this does to a video, from a closed form: beside the model's own long
video 15 % of the variance is lost, and frames further apart than a window share nothing, unless the noise
does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.call_arguments import asked
from diffplug.checks import check_whole
from diffplug.intercept import PipelineCall, Undo, intercept_call, original_class
from diffplug.network.denoiser import denoisers, wrap_forward
from diffplug.registry import unknown
from diffplug.samplers.video.free_noise import NOISES, frame_order, rearranged
from diffplug.samplers.video.network_axes import Axes, VideoCall, axes_of, shown_channels
from diffplug.samplers.video.window_plan import (
    WEIGHTS,
    latents_of,
    plan,
    temporal_compression,
    window_weights,
)

__all__ = ["Windows", "windowed"]

_PICTURES = ("image", "last_image", "image_embeds", "conditions", "reference_images")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A plug that cuts every call of the denoiser into overlapping windows of frames.

    frames: of a window, the number that the model was trained for (Wan 81, CogVideoX 49, AnimateDiff 16).
    overlap: frames that neighbours share, a multiple of the decoder's temporal compression.
    weights: "pyramid" (a frame counts less towards a window's ends) or "flat".
    noise: "iid" as the pipeline draws it; "free" shuffles the first window's noise into the later ones
    (FreeNoise), which keeps appearance and brings motion back every window; "repeat" repeats it.
    keep_first: for models that are shown a picture in extra channels: every window then starts from that
    picture again. Without it such calls are refused, as no window but the first would see the picture; with
    it models that are shown none are.

    The network costs n = 1 + ceil((L - W) / S) windows a call, and its memory does not grow with the video;
    the decoder's does. Raises ValueError at once for bad numbers, when attached for unknown networks and
    feature caches, and in a call for lengths that do not fit.
    """

    frames: int
    overlap: int
    weights: str = "pyramid"
    noise: str = "iid"
    keep_first: bool = False
    slot = "windows"

    def __post_init__(self) -> None:
        check_whole("frames", self.frames)
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or self.overlap < 0:
            raise ValueError(f"overlap={self.overlap!r}: it must be a whole number of at least 0")
        if self.overlap >= self.frames:
            raise ValueError(
                f"overlap={self.overlap} leaves a window of {self.frames} frames nothing new: take less"
            )
        if self.weights not in WEIGHTS:
            raise unknown("window weights", self.weights, list(WEIGHTS))
        if self.noise not in NOISES:
            raise unknown("window noise", self.noise, list(NOISES))

    def attach(self, pipe: Any) -> Undo:
        """Stand at the forward of every denoiser and around the pipeline's call; return what undoes it."""
        networks = denoisers(pipe)
        axes = [axes_of(network) for network in networks]
        if self.keep_first and not _shown_in_channels(pipe):
            raise ValueError(
                f"Windows(keep_first=True) does nothing here: this {type(networks[0]).__name__} is shown no "
                "picture in channels of its own, which could be repeated. Leave it out; from a picture, "
                "continue the clip with LongVideo"
            )
        for network in networks:
            if getattr(network, "is_cache_enabled", False):
                raise ValueError(
                    f"{type(network).__name__} caches features, which windows would mix up: call its "
                    "disable_cache() first"
                )
        size, overlap = self.latents(pipe)
        if self.noise != "iid" and not hasattr(pipe, "prepare_latents"):
            raise ValueError(f"noise={self.noise!r}: {type(pipe).__name__} has no prepare_latents to fill")
        with ExitStack() as undo:
            for network in networks:
                undo.callback(wrap_forward(network, self._around(network, size, overlap)))
            undo.callback(intercept_call(pipe, self._around_call(axes[0], size, overlap)))
            return undo.pop_all().close

    def latents(self, pipe: Any) -> tuple[int, int]:
        """Return window and overlap in latent frames; ValueError where they do not fit a pipeline."""
        ratio = temporal_compression(pipe)
        size = latents_of(self.frames, ratio, "Windows(frames=...)")
        if self.overlap % ratio:
            below = self.overlap // ratio * ratio
            raise ValueError(
                f"Windows(overlap={self.overlap}) does not fit {type(pipe).__name__}, whose latents stand "
                f"for {ratio} frames: take {below} or {below + ratio}"
            )
        for network in denoisers(pipe):
            fixed = getattr(network, "config", {}).get("video_length")
            if fixed is not None and size != fixed:
                raise ValueError(
                    f"this {type(network).__name__} has positions for {fixed} frames exactly: take "
                    f"Windows(frames={fixed})"
                )
        if self.overlap // ratio >= size:
            raise ValueError(f"Windows(overlap={self.overlap}) leaves a window of {size} latents nothing new")
        return size, self.overlap // ratio

    def _around(self, network: Any, size: int, overlap: int) -> Callable[..., Any]:
        def forward_in_windows(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = VideoCall.of(network, args, kwargs)
            if call.frames <= size:
                return forward(*args, **kwargs)
            return windowed(forward, call, size, overlap, self.weights, keep_first=self.keep_first)

        return forward_in_windows

    def _around_call(self, axes: Axes, size: int, overlap: int) -> Callable[..., Any]:
        def around(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
            self._check_call(call.pipe, kwargs)
            if self.noise == "iid":
                return call(**kwargs)
            with self._own_noise(call.pipe, axes, kwargs, size, overlap):
                return call(**kwargs)

        return around

    def _check_call(self, pipe: Any, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for a call that windows would spoil."""
        name, ratio = original_class(pipe).__name__, temporal_compression(pipe)
        frames = asked(pipe, kwargs, "num_frames")
        long = isinstance(frames, int) and frames > self.frames
        if long:
            latents_of(frames, ratio, "num_frames")
        elif isinstance(frames, int):
            warnings.warn(
                f"Windows(frames={self.frames}) does nothing for {frames} frames, which fit into one: ask "
                "for more frames, or leave it out",
                stacklevel=4,
            )
        given = [one for one in (*_PICTURES, *_prefixes(pipe)) if kwargs.get(one) is not None]
        if given and long and not self.keep_first:
            again = "or pass Windows(keep_first=True) to start every window from that picture again"
            raise ValueError(
                f"{given[0]}= of {name} is seen by the first window only, which the model was never trained "
                f"for: continue the clip with LongVideo{', ' + again if _shown_in_channels(pipe) else ''}"
            )
        if self.noise != "iid" and kwargs.get("video") is not None and frames is None:
            raise ValueError(
                f"Windows(noise={self.noise!r}) would shuffle the frames of the video that {name} begins "
                "with: leave noise out"
            )
        if self.noise != "iid" and kwargs.get("latents") is not None:
            raise ValueError(f"latents= were given beside Windows(noise={self.noise!r}): leave one out")

    @contextmanager
    def _own_noise(
        self, pipe: Any, axes: Axes, kwargs: dict[str, Any], size: int, overlap: int
    ) -> Iterator[None]:
        """A block in which the pipeline's initial noise is rearranged; the first window keeps its own."""
        own, prepare = vars(pipe).get("prepare_latents"), pipe.prepare_latents
        frames = asked(pipe, kwargs, "num_frames")

        def prepared(*args: Any, **named: Any) -> Any:
            found = prepare(*args, **named)
            noise = found[0] if isinstance(found, tuple) else found
            mixed = self._mixed(noise, axes, kwargs.get("generator"), size, overlap, frames, pipe)
            return (mixed, *found[1:]) if isinstance(found, tuple) else mixed

        vars(pipe)["prepare_latents"] = prepared
        try:
            yield
        finally:
            vars(pipe).pop("prepare_latents", None)
            if own is not None:
                vars(pipe)["prepare_latents"] = own

    def _mixed(
        self, noise: Tensor, axes: Axes, generator: Any, size: int, overlap: int, frames: int, pipe: Any
    ) -> Tensor:
        axis = 1 if axes.packed else axes.axis
        length = latents_of(frames, temporal_compression(pipe), "num_frames")
        x = noise.unflatten(1, (length, -1)) if axes.packed else noise
        if x.shape[axis] <= size:
            return noise
        generators = _shuffles(generator, len(x))
        orders = [frame_order(x.shape[axis], size, overlap, self.noise, one) for one in generators]
        mixed = rearranged(x, axis, orders)
        return mixed.flatten(1, 2) if axes.packed else mixed


def windowed(
    forward: Callable[..., Any],
    call: VideoCall,
    size: int,
    overlap: int,
    weights: str = "pyramid",
    *,
    keep_first: bool = False,
) -> Any:
    """Return a network's output on a long video: sum_k w pad(net(x_k)) / sum_k w.

    size, overlap: in latent frames. The sums are kept in float32 or wider, and every window has `size`
    frames.
    """
    axis = 1 if call.axes.packed else call.axes.axis
    weight = window_weights(size, weights)
    total: Tensor | None = None
    counted = torch.zeros(call.frames, dtype=torch.float64)
    output: Any = None
    for start in plan(call.frames, size, overlap):
        output = forward(**call.window(start, size, keep_first=keep_first))
        part = _first(output)
        part = part.unflatten(1, (size, -1)) if call.axes.packed else part
        wide = torch.promote_types(part.dtype, torch.float32)
        if total is None:
            total = part.new_zeros([*part.shape[:axis], call.frames, *part.shape[axis + 1 :]], dtype=wide)
        total.narrow(axis, start, size).add_(part.to(wide) * _along(weight, part, axis).to(wide))
        counted[start : start + size] += weight
    assert total is not None  # noqa: S101 -- a plan has a window
    mean = (total / _along(counted, total, axis)).to(_first(output).dtype)
    return _with_first(output, mean.flatten(1, 2) if call.axes.packed else mean)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Return numbers [f] shaped to multiply a tensor along its frame axis."""
    return values.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(
        -1, *(1,) * (like.ndim - axis - 1)
    )


def _first(output: Any) -> Tensor:
    """Return the tensor of a network's output: a tuple, an output object or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0]
    return found


def _with_first(output: Any, x: Tensor) -> Any:
    """Return an output of the same kind that holds another tensor."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    if is_dataclass(output) and not isinstance(output, type):
        rest = {entry.name: getattr(output, entry.name) for entry in fields(output)}
        return type(output)(**{**rest, next(iter(rest)): x})
    raise ValueError(
        f"a network returned {type(output).__name__}: windows know tuples and Diffusers' outputs"
    )


def _prefixes(pipe: Any) -> tuple[str, ...]:
    """Return the arguments that give first frames in pipelines where `video` means that."""
    known = original_class(pipe).__name__.startswith(("Cosmos", "LTXCondition"))
    return ("video",) if known or hasattr(pipe, "prefix_frames") else ()


def _shown_in_channels(pipe: Any) -> bool:
    """Return whether a denoiser is shown pictures in channels beside the noisy latents."""
    return any(shown_channels(network) for network in denoisers(pipe))


def _shuffles(generator: Any, rows: int) -> list[torch.Generator]:
    """Return a generator for the order of each row's frames, without using up the call's own.

    It follows the call's seeds; a call without a generator draws one from the global stream.
    """
    if generator is None:
        seeds = [int(torch.randint(2**62, ())) for _ in range(rows)]
    elif isinstance(generator, (list, tuple)):
        seeds = [one.initial_seed() for one in generator]
    else:
        seeds = [generator.initial_seed() + row for row in range(rows)]
    return [torch.Generator().manual_seed((seed ^ 0x5EED) & (2**63 - 1)) for seed in seeds]
