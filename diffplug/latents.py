"""Latents to pictures, for every family of pipelines: unpacked, unscaled, decoded a few rows at a time."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FRAMES_FIRST = ("CogVideoX", "ConsisID", "StableVideoDiffusion")  # latents [n, f, c, h, w]


def decode(
    pipe: Any,
    latents: Tensor,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    batch_size: int = 4,
    vae: Any = None,
) -> Tensor:
    """Return pictures `[n, 3, h, w]` (videos `[n, f, 3, h, w]`), float32 in [0, 1], of a step's latents.

    One decoder call for every `batch_size` rows (fewer when memory runs out); pixel models cost nothing. The
    pipeline's modules stay where and as they are. Gradients flow when `latents` asks for them.

    latents: `[n, c, h, w]`, `[n, c, f, h, w]` for videos, or packed `[n, tokens, 4 c]` (FLUX, Qwen-Image).
    height, width: the call's, in pixels; needed for packed latents of pictures that are not square.
    num_frames: the call's; needed for packed videos (LTX).
    vae: another decoder of the same latents, such as an `AutoencoderTiny` for previews.
    Raises ValueError for packed latents whose size cannot be known, and for latents that the decoder cannot
    take.
    """
    return PictureDecoder(pipe, height=height, width=width, num_frames=num_frames, vae=vae)(
        latents, batch_size=batch_size
    )


class PictureDecoder:
    """Decodes the latents of one call of a pipeline; what the decoder is and wants is looked up once.

    Arguments and errors as in `decode`. A decoder that says float16 is too narrow for it (SDXL) is copied to
    float32 for as long as this object lives.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        vae: Any = None,
    ) -> None:
        self.pipe, self.size = pipe, (num_frames, height, width)
        self.decoder = decoder_of(pipe) if vae is None else vae
        if self.decoder is None:
            return
        self.config = self.decoder.config
        self.copied = not self.config.get("force_upcast")
        self.channels = self.config.get("latent_channels") or self.config.get("z_dim")
        accepted = inspect.signature(self.decoder.decode).parameters
        self.quantises = "force_not_quantize" in accepted  # its pipelines do not scale its latents
        self.scale = 1.0 if self.quantises else self.config.get("scaling_factor") or 1.0
        self.shift = self.config.get("shift_factor") or 0.0
        self.statistics = _channel_statistics(self.decoder)
        self.takes_videos = _takes_videos(self.decoder)
        self.counts_frames = "num_frames" in accepted

    def __call__(self, latents: Tensor, *, batch_size: int = 4) -> Tensor:
        """Return pictures of latents, so many rows at a time."""
        if batch_size < 1:
            raise ValueError(
                f"batch_size is the number of rows decoded at once, at least 1, not {batch_size}."
            )
        if self.decoder is None:
            return _pixels(self.pipe, latents)
        if not self.copied:
            self.decoder, self.copied = _wide_enough(self.decoder), True
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            z = latents if latents.ndim == 4 else unpack(self.pipe, latents, *self.size)
            if z.ndim not in (4, 5) or (self.channels and z.shape[1] != self.channels):
                raise ValueError(
                    f"{type(self.decoder).__name__} decodes latents of {self.channels} channels, not "
                    f"of shape {tuple(z.shape)}: give the latents as the scheduler's step sees them."
                )
            out = _in_slices(self._rows, z, batch_size)
        still = latents.ndim == 3 and out.ndim == 5 and not _packs_videos(self.pipe)
        return out[:, 0] if still else out

    def _rows(self, z: Tensor) -> Tensor:
        """Return the pictures of a few rows of scaled latents."""
        weights, frames = next(self.decoder.parameters()), z.shape[2] if z.ndim == 5 else 0
        folded = frames and (self.counts_frames or not self.takes_videos)
        if folded:
            z = z.transpose(1, 2).flatten(0, 1)
        hook = getattr(self.decoder, "_hf_hook", None)  # of offloading, which will put it elsewhere
        z = z.to(getattr(hook, "execution_device", None) or weights.device, weights.dtype)
        if self.statistics is None:
            z = z / self.scale + self.shift
        else:
            shape = (1, -1) + (1,) * (z.ndim - 2)
            mean, std = (torch.as_tensor(one).to(z).reshape(shape) for one in self.statistics)
            z = z * std / self.scale + mean
        extra: dict[str, Any] = {"num_frames": frames} if folded and self.counts_frames else {}
        if self.quantises:
            extra["force_not_quantize"] = True
        if self.config.get("timestep_conditioning"):
            extra["temb"] = z.new_zeros(len(z))
        out = self.decoder.decode(z, **extra, return_dict=False)[0]
        if folded:
            out = out.unflatten(0, (-1, frames))
        elif out.ndim == 5:
            out = out.transpose(1, 2)
        return (out.float() / 2 + 0.5).clamp(0, 1)


def decoder_of(pipe: Any) -> Any:
    """Return the autoencoder of a pipeline (Kandinsky's is called movq), None for models of pixels."""
    vae = getattr(pipe, "vae", None)
    return getattr(pipe, "movq", None) if vae is None else vae


def unpack(
    pipe: Any,
    latents: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Latents `[n, c, h, w]` or `[n, c, f, h, w]` from what the scheduler sees, packed or not."""
    if latents.ndim == 3:
        if _packs_videos(pipe):
            return _unpack_video(pipe, latents, num_frames, height, width)
        return _unpack_patches(pipe, latents, height, width)
    if latents.ndim == 5 and type(pipe).__name__.startswith(_FRAMES_FIRST):
        return latents.transpose(1, 2)
    return latents


def _packs_videos(pipe: Any) -> bool:
    return hasattr(pipe, "transformer_temporal_patch_size")


def _unpack_patches(pipe: Any, latents: Tensor, height: int | None, width: int | None) -> Tensor:
    """Return latents `[n, c, h, w]` of 2x2 patches `[n, h w / 4, 4 c]`; Qwen-Image's get a frame axis."""
    n, tokens, channels = latents.shape
    if channels % 4:
        raise ValueError(
            f"{type(pipe).__name__}: packed latents of {channels} channels cannot be decoded here."
        )
    rows, columns = _token_grid(pipe, tokens, height, width)
    if hasattr(pipe, "_unpatchify_latents"):
        return _unpack_normalised(pipe, latents.transpose(1, 2).reshape(n, channels, rows, columns))
    z = latents.reshape(n, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    z = z.reshape(n, channels // 4, 2 * rows, 2 * columns)
    return z.unsqueeze(2) if _takes_videos(decoder_of(pipe)) else z


def _unpack_normalised(pipe: Any, z: Tensor) -> Tensor:
    """Return latents of FLUX.2, whose patches `[n, 4 c, h, w]` are normalised by channel."""
    norm, config = getattr(decoder_of(pipe), "bn", None), decoder_of(pipe).config
    if norm is None:
        raise ValueError(
            f"{type(pipe).__name__}: packed latents of {z.shape[1]} channels cannot be decoded here."
        )
    mean, variance = (one.to(z).reshape(1, -1, 1, 1) for one in (norm.running_mean, norm.running_var))
    return pipe._unpatchify_latents(z * (variance + config.batch_norm_eps).sqrt() + mean)


def _token_grid(pipe: Any, tokens: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Rows and columns of 2x2 patches, from the size in pixels or, for squares, from the number of tokens."""
    scale = 2 * int(pipe.vae_scale_factor)
    if height is None and width is None:
        side = math.isqrt(tokens)
        grid = (side, side)
    else:
        grid = ((height or width or 0) // scale, (width or height or 0) // scale)
    if grid[0] * grid[1] != tokens:
        given = "no height and width" if height is None and width is None else f"{height}x{width} pixels"
        raise ValueError(
            f"Packed latents of {tokens} tokens were given with {given} ({scale} pixels a token): "
            "give the height and width of the call."
        )
    return grid


def _unpack_video(
    pipe: Any, latents: Tensor, num_frames: int | None, height: int | None, width: int | None
) -> Tensor:
    """LTX's packed videos as `[n, c, f, h, w]`, by the pipeline's own rule."""
    if num_frames is None or height is None or width is None:
        raise ValueError("Packed videos need the num_frames, height and width of the call.")
    frames = (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
    space = pipe.vae_spatial_compression_ratio
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    return pipe._unpack_latents(latents, frames, height // space, width // space, *patches)


def _channel_statistics(decoder: Any) -> tuple[Any, Any] | None:
    """Mean and standard deviation of a decoder's latents by channel, where it has them."""
    for home in (dict(decoder.named_buffers(recurse=False)), decoder.config):  # LTX has them as buffers
        mean, std = home.get("latents_mean"), home.get("latents_std")
        if mean is not None and std is not None:
            return mean, std
    return None


def _takes_videos(decoder: Any) -> bool:
    """Whether a decoder has convolutions over time."""
    return any(isinstance(part, torch.nn.Conv3d) for part in decoder.modules())


def _pixels(pipe: Any, x: Tensor) -> Tensor:
    """The pictures of a model without an autoencoder, which works on pixels in [-1, 1]."""
    if x.ndim < 4 or x.shape[-3] not in (1, 3):
        raise ValueError(f"{type(pipe).__name__} has no vae, and {tuple(x.shape)} is no shape of pictures.")
    return (x.float() / 2 + 0.5).clamp(0, 1)


def _wide_enough(decoder: Any) -> Any:
    """Return a decoder that says float16 is too narrow for it (SDXL), or a float32 copy of one in float16."""
    narrow = next(decoder.parameters()).dtype == torch.float16
    return copy.deepcopy(decoder).float() if narrow else decoder


def _in_slices(work: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """`work` on a few rows at a time, put together; out of memory, half as many rows are tried again."""
    done: list[Tensor] = []
    start = 0
    while start < len(rows):
        try:
            done.append(work(rows[start : start + batch_size]))
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = -(-batch_size // 2)
            continue
        start += batch_size
    if not done:
        raise ValueError(f"There are no latents to decode: their shape is {tuple(rows.shape)}.")
    return torch.cat(done)
