"""How many frames a clip has: what a pipeline calls the number, and which numbers it really makes."""

from __future__ import annotations

import inspect
from typing import Any

from diffplug.call_arguments import asked
from diffplug.checks import check_whole
from diffplug.intercept import original_class
from diffplug.samplers.video.window_plan import latents_of, temporal_compression

__all__ = ["clip_frames_of", "hidden_frames", "length_argument"]


def length_argument(pipe: Any) -> str | None:
    """Return the argument that tells a pipeline the frames of a clip; None for clips of one length."""
    known = inspect.signature(original_class(pipe).__call__).parameters
    names = ("num_frames", "frames")  # `frames`: Sana
    return next((name for name in names if name in known), None)


def hidden_frames(pipe: Any) -> int:
    """Return how many frames a pipeline makes at the front of a clip and leaves out of what it returns.

    HunyuanVideo leaves out four where its network is told the picture in channels ("latent_concat").
    """
    if not original_class(pipe).__name__.startswith("HunyuanVideoImageToVideo"):
        return 0
    return 4 if pipe.transformer.config.image_condition_type == "latent_concat" else 0


def clip_frames_of(pipe: Any, given: int | None) -> int:
    """Return the frames of one clip, `given` or the pipeline's own number.

    Raises ValueError, before any work, for numbers that this pipeline does not make.
    """
    frames = _own_length(pipe) if given is None else given
    if frames is None:
        raise ValueError(f"{type(pipe).__name__} has no number of frames of its own: give clip_frames=")
    check_whole("clip_frames", frames)
    latents_of(frames, temporal_compression(pipe), "clip_frames")
    if trouble := _trouble(pipe, frames):
        raise ValueError(f"clip_frames {frames} does not fit {original_class(pipe).__name__}: {trouble}")
    return frames


def _own_length(pipe: Any) -> int | None:
    name = None if pipe is None else length_argument(pipe)
    frames = None if name is None else asked(pipe, {}, name)
    if frames is None:
        return getattr(getattr(getattr(pipe, "unet", None), "config", None), "num_frames", None)
    return int(frames) - hidden_frames(pipe)


def _trouble(pipe: Any, frames: int) -> str:
    """Return why a pipeline makes no clip of so many frames though its latents fit; empty where it does."""
    name, ratio = original_class(pipe).__name__, temporal_compression(pipe)
    if name.startswith("CogVideoX") and (frames - 1) % (2 * ratio):
        below = 1 + (frames - 1) // (2 * ratio) * 2 * ratio
        return f"it decodes latents in pairs after the first, so take {below} or {below + 2 * ratio}"
    if name.startswith("Kandinsky5") and 1 < frames <= 4 * ratio:
        return (
            f"its first four latents get their colours from the ones after them: take {4 * ratio + 1} or more"
        )
    return ""
