"""How the last frames of a clip are handed to the next: one adapter for each kind of pipeline.

    image      one frame as `image=`              Wan, SkyReels, HunyuanVideo, CogVideoX, LTX, Sana, SVD, ...
    video      p frames as `video=`               Cosmos, Moving Shapes
    ltx        p = 1 + 8 m frames as a condition  LTXConditionPipeline
    vace       p frames, the rest masked          WanVACEPipeline
    latents    p = 1 + 4 m frames, no decoding    Wan 2.2 TI2V (`expand_timesteps`), experimental

Frames are float tensors in [0, 1] and never 8-bit pictures: rounding at every join moves colours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.pictures import raw_pictures, to_tensor
from diffplug.samplers.video.clip_length import hidden_frames, length_argument
from diffplug.samplers.video.float_pictures import float_pictures, pil_picture, takes_pil_alone
from diffplug.samplers.video.precision import own_precision
from diffplug.samplers.video.window_plan import temporal_compression

__all__ = ["HandOver", "PipelineHandOver", "hand_over"]


class HandOver(Protocol):
    """What `LongVideo` asks of a model: which prefixes it continues, and the next clip.

    One that hands on more than frames has a dict of tensors `carried` beside this: `LongVideo` sets it before
    every clip to what the clip before left there, and keeps it where the video is written.
    """

    name: str

    def trouble(self, prefix_frames: int) -> str:
        """Return why a prefix of so many frames cannot be handed over; empty where it can."""
        ...

    def clip(self, prefix: Tensor | None, frames: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return a clip [frames, 3, h, w] in [0, 1] that begins with `prefix` [p, 3, h, w]."""
        ...


Told = Callable[[Any, Tensor, int], dict[str, Any]]
Begun = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
Around = Callable[[Any, "Tensor | None", dict[str, Tensor]], AbstractContextManager[None]]


def _as_given(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@contextmanager
def _nothing(pipe: Any, prefix: Tensor | None, carried: dict[str, Tensor]) -> Iterator[None]:
    yield


@dataclass
class PipelineHandOver:
    """The hand-over to a Diffusers pipeline.

    told: what its call is told of a prefix. lengths: the prefixes it takes. around: a block in which the call
    is made. begun: what changes in the arguments of a clip without a prefix. begins_with: of these arguments
    such a clip needs one. carried: see `HandOver`.
    """

    pipe: Any
    name: str
    told: Told
    lengths: range | tuple[int, ...]
    around: Around = _nothing
    begun: Begun = _as_given
    begins_with: tuple[str, ...] = ()
    carried: dict[str, Tensor] = field(default_factory=dict)

    def trouble(self, prefix_frames: int) -> str:
        """Return why a prefix of so many frames cannot be handed over; empty where it can."""
        if prefix_frames in self.lengths:
            return ""
        known = [str(n) for n in self.lengths if n < 40]
        more = ", ..." if len(known) < len(self.lengths) else ""
        listed = ", ".join(known) + more
        return f"{original_class(self.pipe).__name__} continues {listed} frame{'s' * (known != ['1'])}"

    def clip(self, prefix: Tensor | None, frames: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return a clip [frames, 3, h, w] in [0, 1] that begins with `prefix` [p, 3, h, w].

        Raises ValueError where the pipeline returns several videos, or numbers that are not finite.
        """
        told = self.begun(self.pipe, arguments) if prefix is None else self.told(self.pipe, prefix, frames)
        call = {"output_type": "pt", **arguments, **told}
        if (name := length_argument(self.pipe)) is not None:
            call[name] = frames + hidden_frames(self.pipe)
        with own_precision(self.pipe), self.around(self.pipe, prefix, self.carried):
            video = to_tensor(raw_pictures(self.pipe(**call)))
        kind = original_class(self.pipe).__name__
        if video.ndim != 5 or len(video) != 1:
            raise ValueError(
                f"{kind} returned videos of shape {tuple(video.shape)}: a long "
                "video is made of one clip at a time, so give one prompt"
            )
        if not bool(video.isfinite().all()):
            raise ValueError(
                f"{kind} made pixels that are not numbers (NaN or infinite), and later clips would go on "
                "from them: try a wider dtype, or another number of steps or frames"
            )
        return video[0].clamp(0, 1)


def hand_over(pipe: Any) -> PipelineHandOver:
    """Return the hand-over that fits a pipeline.

    Raises ValueError for one that makes long videos by a loop of its own, and for one that takes no first
    frames at all.
    """
    name = original_class(pipe).__name__
    for start in _OWN_LOOPS:
        if name.startswith(start):
            raise ValueError(
                f"{name} has num_frames of its own for long videos (it loops over clips itself): call it "
                "directly with the number of frames you want"
            )
    parameters = inspect.signature(original_class(pipe).__call__).parameters
    ratio = temporal_compression(pipe)
    causal = range(1, 1 + 64 * ratio, ratio)
    if hasattr(pipe, "prefix_frames"):
        return PipelineHandOver(pipe, "video", _as_video, tuple(pipe.prefix_frames))
    if name == "LTXConditionPipeline":
        return PipelineHandOver(pipe, "ltx", _as_condition, causal)
    if name.startswith("WanVACE"):
        return PipelineHandOver(pipe, "vace", _as_masked_video, range(1, 64 * ratio))
    if name.startswith("Cosmos2_5_Predict"):
        return PipelineHandOver(pipe, "video", _as_known_latents, causal[:2], begun=_known_latents_first)
    if name.startswith(("CosmosVideoToWorld", "Cosmos2VideoToWorld")):
        first = ("image", "video")
        return PipelineHandOver(pipe, "video", _as_known_video, causal, begins_with=first)
    if name.startswith(_PICTURE_PIPELINES) and "image" in parameters:
        return _picture_hand_over(pipe, causal)
    raise ValueError(
        f"{name} takes no first frames that LongVideo knows how to give, so that no clip can continue "
        "another: take the model's image-to-video pipeline, plug Windows into this one, or give "
        "hand_over= an adapter of your own"
    )


def _picture_hand_over(pipe: Any, causal: range) -> PipelineHandOver:
    first = ("image",)
    if getattr(pipe.config, "expand_timesteps", False):
        from diffplug.samplers.video.latent_hand_over import handed_latents

        return PipelineHandOver(pipe, "latents", _as_image, causal, handed_latents, begins_with=first)
    if takes_pil_alone(pipe):
        return PipelineHandOver(
            pipe, "image", _as_pil_picture, (1,), float_pictures, _pil_picture_first, first
        )
    return PipelineHandOver(pipe, "image", _as_image, (1,), float_pictures, begins_with=first)


_OWN_LOOPS = (
    "LTXI2VLongMultiPrompt",
    "SkyReelsV2DiffusionForcing",
    "WanAnimate",
    "Cosmos2_5_Transfer",
    "HunyuanVideoFramepack",
    "Helios",
    "AnyFlow",
)
_PICTURE_PIPELINES = (
    "WanImageToVideo",
    "SkyReelsV2ImageToVideo",
    "HunyuanVideoImageToVideo",
    "HunyuanVideo15ImageToVideo",
    "HunyuanSkyreelsImageToVideo",
    "CogVideoXImageToVideo",
    "LTXImageToVideo",
    "Kandinsky5I2V",
    "SanaImageToVideo",
    "StableVideoDiffusion",
)


def _as_image(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    """Return the frame that the next clip begins with."""
    return {"image": prefix[:1]}


def _as_video(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    return {"video": prefix, "image": None}


def _as_pil_picture(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    """Return the frame as the picture that the call checks; its latents are made from the float frame."""
    return {"image": pil_picture(prefix[0])}


def _pil_picture_first(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    image = arguments.get("image")
    return (
        {"image": pil_picture(image.reshape(-1, *image.shape[-3:])[0])} if isinstance(image, Tensor) else {}
    )


def _as_known_video(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    """Return what Cosmos and Cosmos 2 take: every frame of the video is known."""
    return {"video": prefix[None], "image": None}


def _as_known_latents(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    """Return what Cosmos 2.5 takes: it has to be told how many latents of the video are known."""
    latents = (len(prefix) - 1) // temporal_compression(pipe) + 1
    return {"video": prefix[None], "image": None, "num_latent_conditional_frames": latents}


def _known_latents_first(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a picture tensor, or a video tensor too short for two latents, as Cosmos 2.5 takes it.

    It takes pictures as PIL alone, and wants five frames of any video unless it is told otherwise.
    """
    given = arguments.get("image") if arguments.get("image") is not None else arguments.get("video")
    if not isinstance(given, Tensor):
        return {}
    known = given.reshape(-1, *given.shape[-3:])
    if arguments.get("image") is None and len(known) > temporal_compression(pipe):
        return {}
    return _as_known_latents(pipe, known[-1:], 0)


def _as_condition(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    condition = LTXVideoCondition(video=prefix[None], frame_index=0)
    return {"conditions": [condition], "image": None, "video": None}


def _as_masked_video(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    """Known frames, then grey; the mask is 1 where the model may paint."""
    grey = prefix.new_full((frames - len(prefix), *prefix.shape[1:]), 0.5)
    mask = torch.ones(frames, *prefix.shape[1:])
    mask[: len(prefix)] = 0
    return {"video": torch.cat([prefix, grey])[None], "mask": mask[None]}
