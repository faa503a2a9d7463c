"""Picture tensors in [0, 1] for encoders that expect something else.

Image processors of CLIP and its kin divide by 255 whatever they are given, so that a tensor in [0, 1] becomes
a black picture; Stable Video Diffusion does not resize tensors; HunyuanVideo 1.5 takes PIL pictures alone.
None of them says so. Here the encoders get the picture, and the latents are made from the float tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.samplers.video.replaced import replaced

__all__ = ["float_pictures", "pil_picture", "takes_pil_alone"]


def pil_picture(frame: Tensor) -> Image.Image:
    """Return a frame [3, h, w] in [0, 1] as a PIL picture."""
    return Image.fromarray((frame.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())


def takes_pil_alone(pipe: Any) -> bool:
    """Return whether a pipeline refuses tensors as its picture."""
    return original_class(pipe).__name__.startswith("HunyuanVideo15")


@contextmanager
def float_pictures(pipe: Any, prefix: Tensor | None, carried: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which tensors in [0, 1] reach a pipeline's picture encoders as they expect them."""
    with ExitStack() as undo:
        for name, seen in _ENCODERS.items():
            if hasattr(pipe, name):
                undo.enter_context(replaced(pipe, name, _seeing(seen, pipe, getattr(pipe, name))))
        if takes_pil_alone(pipe) and prefix is not None:
            latents = _float_latents(pipe._get_image_latents, prefix[:1])
            undo.enter_context(replaced(pipe, "_get_image_latents", latents))
        yield


def _seeing(seen: Callable[[Any, Any], Any], pipe: Any, encode: Callable[..., Any]) -> Callable[..., Any]:
    """Return an encoder whose picture, its first argument or `image=`, is made by `seen`."""

    def encoded(*args: Any, **kwargs: Any) -> Any:
        if "image" in kwargs:
            kwargs["image"] = seen(pipe, kwargs["image"])
        elif args:
            args = (seen(pipe, args[0]), *args[1:])
        return encode(*args, **kwargs)

    return encoded


def _as_pil(pipe: Any, image: Any) -> Any:
    """Return pictures with every tensor in [0, 1] or [-1, 1] as a PIL picture, others as they are."""
    if isinstance(image, (list, tuple)):
        return [one for part in image for one in _several(_as_pil(pipe, part))]
    if not isinstance(image, Tensor) or not image.is_floating_point() or float(image.max()) > 1:
        return image
    shown = (image + 1) / 2 if float(image.min()) < 0 else image
    return [pil_picture(one) for one in shown.reshape(-1, *shown.shape[-3:])]


def _several(pictures: Any) -> list[Any]:
    return pictures if isinstance(pictures, list) else [pictures]


def _resized(pipe: Any, image: Any) -> Any:
    """Return a picture tensor in [0, 1] at the size of Stable Video Diffusion's image encoder."""
    if not isinstance(image, Tensor):
        return image
    size = pipe.image_encoder.config.image_size
    return torch.nn.functional.interpolate(
        image, (size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)


def _of_prompt(pipe: Any, image: Any) -> Any:
    """Return the picture that HunyuanVideo's language model sees; prompts of other models are left alone."""
    return _as_pil(pipe, image) if isinstance(image, Tensor) else image


_ENCODERS: dict[str, Callable[[Any, Any], Any]] = {
    "_encode_image": _resized,  # Stable Video Diffusion
    "encode_image": _as_pil,  # Wan, SkyReels V2, HunyuanVideo 1.5
    "encode_prompt": _of_prompt,  # HunyuanVideo
}


def _float_latents(encode: Callable[..., Any], picture: Tensor) -> Callable[..., Any]:
    """Return HunyuanVideo 1.5's encoder with the float picture where it would be the same size."""

    def encoded(*, image: Any, height: int, width: int, **rest: Any) -> Any:
        same = tuple(picture.shape[-2:]) == (height, width)
        return encode(image=picture if same else image, height=height, width=width, **rest)

    return encoded
