"""What a video folder was asked for, as JSON: two equal requests are the same video, to the bit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffplug.intercept import original_class
from diffplug.plug import plugs_on
from diffplug.samplers.fingerprint import conditioning_fingerprint, fingerprint

__all__ = ["described", "sampled_by", "weights_of"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def described(value: Any) -> Any:
    """Return an argument as JSON can hold it; pictures, arrays and tensors by a hash of their content.

    Of other objects their repr without the address, which is another one in every process.
    """
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {_digest(value.detach().cpu().float().numpy().tobytes())}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"array {list(value.shape)} {value.dtype} {_digest(value.tobytes())}"
    if isinstance(value, Image.Image):
        return f"picture {list(value.size)} {_digest(value.convert('RGB').tobytes())}"
    return _ADDRESS.sub("", repr(value))


def sampled_by(pipe: Any) -> list[Any]:
    """Return what a pipeline samples with: its scheduler, a hash of that one's settings, its plugs."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return []
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    text = json.dumps(described(config), sort_keys=True)
    return [original_class(scheduler).__name__, _digest(text.encode()), *map(described, plugs_on(pipe))]


def weights_of(pipe: Any) -> str | None:
    """Return a hash of a pipeline's weights and dtypes; None where they cannot be read."""
    try:
        return (
            None if pipe is None else _digest((fingerprint(pipe) + conditioning_fingerprint(pipe)).encode())
        )
    except (NotImplementedError, RuntimeError, ValueError):  # on a disk; or no denoiser that is known
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
