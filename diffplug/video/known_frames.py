"""First frames that a pipeline is given: what its scheduler sees lacks them, or holds noise in their place.

LTX, Sana and HunyuanVideo (token_replace) step the frames after the picture's alone; Wan 2.2 TI2V steps all
of them and puts the picture's back after the last step. A causal decoder takes the first latent for a
single frame, so a clip that is decoded without it is another clip, and shorter. Here the given latents are
noted when the pipeline prepares them, and put in front of every clean prediction before it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.latents import unpack

__all__ = ["KnownFrames"]

Size = tuple[Any, Any, Any]


def _of_ltx(pipe: Any, prepared: Any, size: Size) -> tuple[Tensor, int]:
    z = unpack(pipe, prepared[0], *size)
    return z[:, :, :1], z.shape[2]


def _of_hunyuan(pipe: Any, prepared: Any, size: Size) -> tuple[Tensor, int] | None:
    if pipe.transformer.config.image_condition_type != "token_replace":
        return None
    return prepared[1][:, :, :1], prepared[0].shape[2]


def _of_sana(pipe: Any, prepared: Any, size: Size) -> tuple[Tensor, int]:
    return prepared[:, :, :1], prepared.shape[2]


def _of_wan(pipe: Any, prepared: Any, size: Size) -> tuple[Tensor, int] | None:
    if not getattr(pipe.config, "expand_timesteps", False):
        return None
    latents, condition, free = prepared
    known = int((free[0, 0, :, 0, 0] == 0).sum())
    return condition[:, :, :known].expand(len(latents), -1, -1, -1, -1), latents.shape[2]


_GIVEN: dict[str, Callable[[Any, Any, Size], tuple[Tensor, int] | None]] = {
    "LTXImageToVideoPipeline": _of_ltx,
    "HunyuanVideoImageToVideoPipeline": _of_hunyuan,
    "SanaImageToVideoPipeline": _of_sana,
    "WanImageToVideoPipeline": _of_wan,
}


class KnownFrames:
    """The given first latents of one call. size: num_frames, height and width of the call."""

    def __init__(self, pipe: Any, size: Size) -> None:
        self.pipe, self.size = pipe, size
        self.read = next(
            (_GIVEN[cls.__name__] for cls in original_class(pipe).__mro__ if cls.__name__ in _GIVEN), None
        )
        self.found: tuple[Tensor, int] | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A block in which the call is made that prepares them."""
        if self.read is None:
            yield
            return
        read, own, prepare = self.read, vars(self.pipe).get("prepare_latents"), self.pipe.prepare_latents

        def prepared(*args: Any, **kwargs: Any) -> Any:
            out = prepare(*args, **kwargs)
            self.found = read(self.pipe, out, self.size)
            return out

        vars(self.pipe)["prepare_latents"] = prepared
        try:
            yield
        finally:
            vars(self.pipe).pop("prepare_latents", None)
            if own is not None:
                vars(self.pipe)["prepare_latents"] = own

    def shown(self, clips: Tensor) -> Tensor:
        """Return decoded clips without the frames that the pipeline makes in front and does not show.

        HunyuanVideo leaves out four where its network is told the picture in channels (latent_concat).
        """
        name = original_class(self.pipe).__name__
        if getattr(clips, "ndim", 0) != 5 or not name.startswith("HunyuanVideoImageToVideo"):
            return clips
        hides = self.pipe.transformer.config.image_condition_type == "latent_concat"
        return clips[:, 4:] if hides and clips.shape[1] > 4 else clips

    def completed(self, x0: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return clean predictions [n, c, f, h, w] with the given frames in place; others as they are.

        rows: which rows of the call these are.
        """
        if self.found is None or x0.ndim != 5:
            return x0
        first, frames = self.found[0][rows].to(x0.device, x0.dtype), self.found[1]
        known = first.shape[2]
        if len(first) != len(x0) or x0.shape[2] not in (frames, frames - known):
            return x0
        rest = x0 if x0.shape[2] == frames - known else x0[:, :, known:]
        return torch.cat([first, rest], 2)
