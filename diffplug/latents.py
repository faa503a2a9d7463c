"""Latents to pictures, for every family of pipelines: unpacked, unscaled, decoded a few rows at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    """Pictures `[n, 3, h, w]` (videos `[n, f, 3, h, w]`), float32 in [0, 1], of the latents that a step sees.

    One decoder call for every `batch_size` rows (fewer when memory runs out); pixel models cost nothing. The
    pipeline's modules stay where and as they are. Gradients flow when `latents` asks for them.

    latents: `[n, c, h, w]`, `[n, c, f, h, w]` for videos, or packed `[n, tokens, 4 c]` (FLUX, Qwen-Image).
    height, width: the call's, in pixels; needed for packed latents of pictures that are not square.
    num_frames: the call's; needed for packed videos (LTX).
    vae: another decoder of the same latents, such as an `AutoencoderTiny` for previews.
    ValueError: packed latents whose size cannot be known, or latents that the decoder cannot take.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is the number of rows decoded at once, at least 1, not {batch_size}.")
    decoder = decoder_of(pipe) if vae is None else vae
    if decoder is None:
        return _pixels(pipe, latents)
    with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
        z = unpack(pipe, latents, num_frames, height, width)
        _check(decoder, z)
        decoder = _wide_enough(decoder)
        out = _in_slices(lambda rows: _to_pictures(_decode_rows(decoder, rows)), z, batch_size)
    still = latents.ndim == 3 and out.ndim == 5 and not _packs_videos(pipe)
    return out[:, 0] if still else out


def decoder_of(pipe: Any) -> Any:
    """The autoencoder of a pipeline, or None for models that work on pixels."""
    return getattr(pipe, "vae", None)


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
    if latents.ndim == 5 and type(pipe).__name__.startswith("CogVideoX"):
        return latents.transpose(1, 2)  # frames come before channels there
    return latents


def _packs_videos(pipe: Any) -> bool:
    return hasattr(pipe, "transformer_temporal_patch_size")


def _unpack_patches(pipe: Any, latents: Tensor, height: int | None, width: int | None) -> Tensor:
    """Latents of 2x2 patches, `[n, h w / 4, 4 c]`, as `[n, c, h, w]`; Qwen-Image's get a frame axis."""
    n, tokens, channels = latents.shape
    if channels % 4 or hasattr(pipe, "_unpatchify_latents"):
        raise ValueError(
            f"{type(pipe).__name__}: packed latents of {channels} channels cannot be decoded here."
        )
    rows, columns = _token_grid(pipe, tokens, height, width)
    z = latents.reshape(n, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    z = z.reshape(n, channels // 4, 2 * rows, 2 * columns)
    return z.unsqueeze(2) if _takes_videos(decoder_of(pipe)) else z


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


def _decode_rows(decoder: Any, z: Tensor) -> Tensor:
    """Decoder output in [-1, 1], `[n, 3, h, w]` or `[n, f, 3, h, w]`, of scaled latents."""
    frames = z.shape[2] if z.ndim == 5 else None
    folded = frames is not None and not _takes_videos(decoder)
    if folded:
        z = z.transpose(1, 2).flatten(0, 1)
    z = unscale(decoder, z.to(_device(decoder), _dtype(decoder)))
    clean = {"temb": z.new_zeros(len(z))} if decoder.config.get("timestep_conditioning") else {}
    out = decoder.decode(z, **clean, return_dict=False)[0]
    if folded:
        return out.unflatten(0, (-1, frames))
    return out.transpose(1, 2) if out.ndim == 5 else out


def unscale(decoder: Any, z: Tensor) -> Tensor:
    """Latents as a decoder takes them, from the normalised ones that the denoiser works on."""
    config = decoder.config
    factor = config.get("scaling_factor") or 1.0
    statistics = _channel_statistics(decoder)
    if statistics is None:
        return z / factor + (config.get("shift_factor") or 0.0)
    shape = (1, -1) + (1,) * (z.ndim - 2)
    mean, std = (torch.as_tensor(one).to(z).reshape(shape) for one in statistics)
    return z * std / factor + mean


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


def _check(decoder: Any, z: Tensor) -> None:
    """ValueError when a decoder is for latents of another number of channels."""
    channels = decoder.config.get("latent_channels") or decoder.config.get("z_dim")
    if z.ndim not in (4, 5) or (channels and z.shape[1] != channels):
        raise ValueError(
            f"{type(decoder).__name__} decodes latents of {channels} channels, not of shape "
            f"{tuple(z.shape)}: give the latents as the scheduler's step sees them."
        )


def _pixels(pipe: Any, x: Tensor) -> Tensor:
    """The pictures of a model without an autoencoder, which works on pixels in [-1, 1]."""
    if x.ndim < 4 or x.shape[-3] not in (1, 3):
        raise ValueError(f"{type(pipe).__name__} has no vae, and {tuple(x.shape)} is no shape of pictures.")
    return _to_pictures(x)


def _to_pictures(out: Tensor) -> Tensor:
    return (out.float() / 2 + 0.5).clamp(0, 1)


def _wide_enough(decoder: Any) -> Any:
    """The decoder, or a float32 copy of one that says float16 is too narrow for it (SDXL)."""
    if decoder.config.get("force_upcast") and _dtype(decoder) == torch.float16:
        return copy.deepcopy(decoder).float()
    return decoder


def _dtype(decoder: Any) -> torch.dtype:
    return next(decoder.parameters()).dtype


def _device(decoder: Any) -> torch.device:
    """Where a decoder computes: where offloading will put it, else where its weights are."""
    hook = getattr(decoder, "_hf_hook", None)
    offloaded = getattr(hook, "execution_device", None)
    return torch.device(offloaded) if offloaded is not None else next(decoder.parameters()).device


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
