"""The arguments with which each tiny pipeline runs quickly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PROMPT = "a red circle"
_SMALL = {"height": 16, "width": 16}
_MIDDLE = {"height": 32, "width": 32}
_TEXT = {"max_sequence_length": 16}


def tiny_inputs(name: str) -> dict[str, Any]:
    """Return the arguments of a family's call: two steps, tensors out, a prompt where it takes one."""
    own = _OWN.get(name, {})
    return {
        "num_inference_steps": 2,
        "output_type": "pt",
        **({} if name in _WITHOUT_PROMPT else {"prompt": _PROMPT}),
        **(own() if callable(own) else own),
    }


def _picture() -> Tensor:
    """A picture of noise, [1, 3, 16, 16] in [0, 1]."""
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def _img2img() -> dict[str, Any]:
    return {"image": _picture(), "strength": 1.0}


def _half_way() -> dict[str, Any]:
    """Two steps of four: a flow that starts at full strength sees nothing of the picture."""
    return {"image": _picture(), "strength": 0.5, "num_inference_steps": 4}


def _inpaint() -> dict[str, Any]:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1.0
    return {"image": _picture(), "mask_image": mask, **_SMALL, "strength": 1.0}


def _kandinsky() -> dict[str, Any]:
    g = torch.Generator().manual_seed(6)
    embeds = torch.randn(2, 1, 32, generator=g)
    return {"image_embeds": embeds[0], "negative_image_embeds": embeds[1], **_SMALL}


_WITHOUT_PROMPT = ("ddpm", "ddim", "consistency", "dit", "svd", "kandinsky22")
_OWN: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    "animatediff": {**_SMALL, "num_frames": 2},
    "auraflow": {**_SMALL, **_TEXT},
    "chroma": {**_SMALL, **_TEXT},
    "cogvideox": {**_SMALL, **_TEXT, "num_frames": 9},
    "consistency": {"batch_size": 1, "class_labels": [1]},
    "controlnet": lambda: {"image": _picture()},
    "ddim": {"batch_size": 1},
    "ddpm": {"batch_size": 1},
    "deepfloyd-if": {"clean_caption": False},
    "dit": {"class_labels": [1]},
    "flux": {**_SMALL, **_TEXT},
    "flux-img2img": lambda: {**_half_way(), **_SMALL, **_TEXT},
    "flux-schnell": {**_SMALL, **_TEXT},
    "flux2-klein": {**_SMALL, **_TEXT, "text_encoder_out_layers": (1,)},
    "hunyuandit": {**_SMALL, "use_resolution_binning": False},
    "kandinsky22": _kandinsky,
    "ltx": {**_MIDDLE, **_TEXT, "num_frames": 9},
    "lumina2": {"height": 64, "width": 64, "max_sequence_length": 256},  # a system prompt comes first
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "qwenimage": {**_SMALL, "max_sequence_length": 256},  # one token a letter: the template is long
    "sana": {**_MIDDLE, **_TEXT, "use_resolution_binning": False, "complex_human_instruction": None},
    "sana-sprint": {**_MIDDLE, **_TEXT, "use_resolution_binning": False, "complex_human_instruction": None},
    "sd15-img2img": _img2img,
    "sd15-inpaint": _inpaint,
    "sd3": {**_SMALL, **_TEXT},
    "sdxl-img2img": _img2img,
    "sdxl-inpaint": _inpaint,
    "svd": lambda: {"image": _picture(), **_SMALL, "num_frames": 2, "decode_chunk_size": 2},
    "wan": {**_SMALL, **_TEXT, "num_frames": 5},
    "wan22": {**_SMALL, **_TEXT, "num_frames": 5},
    "z-image": {**_SMALL, **_TEXT},
}
