"""How the last frames of a clip are handed to the next: one adapter for each kind of pipeline.

    image      one frame as `image=`              Wan, HunyuanVideo, CogVideoX, LTX, Kandinsky 5, Sana, SVD
    video      p frames as `video=`               Cosmos, Moving Shapes
    ltx        p = 1 + 8 m frames as a condition  LTXConditionPipeline
    vace       p frames, the rest masked          WanVACEPipeline
    latents    p = 1 + 4 m frames, no decoding    Wan 2.2 TI2V (`expand_timesteps`), experimental

Frames are float tensors in [0, 1] and never 8-bit pictures: rounding at every join moves colours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.pictures import raw_pictures, to_tensor
from diffplug.samplers.video.window_plan import temporal_compression

__all__ = ["HandOver", "PipelineHandOver", "hand_over"]


class HandOver(Protocol):
    """What `LongVideo` asks of a model: which prefixes it continues, and the next clip."""

    name: str

    def trouble(self, prefix_frames: int) -> str:
        """Return why a prefix of so many frames cannot be handed over; empty where it can."""
        ...

    def clip(self, prefix: Tensor | None, frames: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return a clip [frames, 3, h, w] in [0, 1] that begins with `prefix` [p, 3, h, w]."""
        ...


Told = Callable[[Any, Tensor, int], dict[str, Any]]
Around = Callable[[Any, "Tensor | None"], AbstractContextManager[None]]


class PipelineHandOver:
    """The hand-over to a Diffusers pipeline.

    told: what its call is told of a prefix. lengths: the prefixes it takes. around: a block in which the call
    is made.
    """

    def __init__(
        self, pipe: Any, name: str, told: Told, lengths: range | tuple[int, ...], around: Around | None = None
    ) -> None:
        self.pipe, self.name, self.told, self.lengths = pipe, name, told, lengths
        self.around: Around = around or (lambda pipe, prefix: nullcontext())

    def trouble(self, prefix_frames: int) -> str:
        """Return why a prefix of so many frames cannot be handed over; empty where it can."""
        if prefix_frames in self.lengths:
            return ""
        known = [str(n) for n in self.lengths if n < 40]
        more = ", ..." if len(known) < len(self.lengths) else ""
        listed = ", ".join(known) + more
        return f"{original_class(self.pipe).__name__} continues {listed} frame{'s' * (known != ['1'])}"

    def clip(self, prefix: Tensor | None, frames: int, arguments: Mapping[str, Any]) -> Tensor:
        """Return a clip [frames, 3, h, w] in [0, 1] that begins with `prefix` [p, 3, h, w]."""
        told = {} if prefix is None else self.told(self.pipe, prefix, frames)
        known = inspect.signature(original_class(self.pipe).__call__).parameters
        call = {"num_frames": frames, "output_type": "pt", **arguments, **told}
        if "num_frames" not in known:
            del call["num_frames"]
        with self.around(self.pipe, prefix):
            video = to_tensor(raw_pictures(self.pipe(**call)))
        if video.ndim != 5 or len(video) != 1:
            raise ValueError(
                f"{original_class(self.pipe).__name__} returned videos of shape {tuple(video.shape)}: a long "
                "video is made of one clip at a time, so give one prompt"
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
    ratio, parameters = (
        temporal_compression(pipe),
        inspect.signature(original_class(pipe).__call__).parameters,
    )
    causal = range(1, 1 + 64 * ratio, ratio)
    if hasattr(pipe, "prefix_frames"):
        return PipelineHandOver(pipe, "video", _as_video, tuple(pipe.prefix_frames))
    if name == "LTXConditionPipeline":
        return PipelineHandOver(pipe, "ltx", _as_condition, causal)
    if name.startswith("WanVACE"):
        return PipelineHandOver(pipe, "vace", _as_masked_video, range(1, 64 * ratio))
    if name.startswith("Cosmos") and "video" in parameters:
        limit = 2 if "num_latent_conditional_frames" in parameters else 64
        return PipelineHandOver(pipe, "video", _as_cosmos_video, causal[:limit])
    if name.startswith(_PICTURE_PIPELINES) and "image" in parameters:
        if getattr(pipe.config, "expand_timesteps", False):
            from diffplug.samplers.video.latent_hand_over import LatentHandOver

            keeper = LatentHandOver()
            return PipelineHandOver(pipe, "latents", _as_image, causal, keeper.around)
        return PipelineHandOver(pipe, "image", _as_image, (1,), _float_pictures)
    raise ValueError(
        f"{name} takes no first frames, so that no clip can continue another: take the model's "
        "image-to-video pipeline, or plug Windows into this one"
    )


_OWN_LOOPS = (
    "LTXI2VLongMultiPrompt",
    "SkyReelsV2DiffusionForcing",
    "WanAnimate",
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


def _as_cosmos_video(pipe: Any, prefix: Tensor, frames: int) -> dict[str, Any]:
    told: dict[str, Any] = {"video": prefix[None], "image": None}
    parameters = inspect.signature(original_class(pipe).__call__).parameters
    if "num_latent_conditional_frames" in parameters:
        told["num_latent_conditional_frames"] = (len(prefix) - 1) // temporal_compression(pipe) + 1
    return told


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


@contextmanager
def _float_pictures(pipe: Any, prefix: Tensor | None) -> Iterator[None]:
    """A block in which tensors in [0, 1] reach CLIP as it expects them.

    Wan's processor divides by 255 once more, and Stable Video Diffusion does not resize tensors: neither says
    so. The latents are made from the float tensor in both.
    """
    name = "_encode_image" if hasattr(pipe, "_encode_image") else "encode_image"
    encode = getattr(pipe, name, None)
    if prefix is None or encode is None or getattr(pipe, "image_encoder", None) is None:
        yield
        return
    own = vars(pipe).get(name)

    def encoded(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, Tensor):
            image = _for_clip(pipe, image)
        return encode(image, *args, **kwargs)

    vars(pipe)[name] = encoded
    try:
        yield
    finally:
        vars(pipe).pop(name, None)
        if own is not None:
            vars(pipe)[name] = own


def _for_clip(pipe: Any, image: Tensor) -> Any:
    """Return a picture [1, 3, h, w] in [0, 1] as the pipeline's image encoder is to get it."""
    if not hasattr(pipe, "_encode_image"):
        from PIL import Image

        pixels = (image.clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
        return [Image.fromarray(one) for one in pixels]
    size = pipe.image_encoder.config.image_size
    return torch.nn.functional.interpolate(
        image, (size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
