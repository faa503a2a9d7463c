"""The tiny pipeline of each family that a row of the catalogue is for, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffplug.testing import tiny

_TINY = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux-dev": "flux",
    "qwen-image": "qwenimage",
    "wan-t2v": "wan",
    "pixart": "pixart",
}
_BUILT: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
PIPELINES = (*_TINY, *_BUILT)
_calls: dict[str, dict[str, Any]] = {}


def pipeline(family: str) -> Any:
    """Return a fresh tiny pipeline of a family, in evaluation mode, float32."""
    if family in _TINY:
        return tiny(_TINY[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, _calls[family] = _BUILT[family]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def inputs(family: str) -> dict[str, Any]:
    """Return arguments with which the pipeline of a family runs quickly."""
    return tiny.inputs(_TINY[family]) if family in _TINY else _calls[family]
