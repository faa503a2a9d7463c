"""Runs of tiny pipelines with negative prompts."""

from __future__ import annotations

from typing import Any

import torch

from diffplug.samplers.negative.call import unguided
from diffplug.testing import tiny

CROSS = ["sd15", "sdxl", "controlnet", "lcm", "animatediff", "pixart", "sana", "ltx", "wan", "wan22"]
JOINT = ["sd3", "flux", "flux-schnell", "flux2-klein", "qwenimage", "z-image"]


def drawn(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    """Final latents of a run from one seed."""
    generator = torch.Generator().manual_seed(0)
    told = {"generator": generator, "output_type": "latent", **changes}
    latents: torch.Tensor = pipe(**tiny.inputs(name, **told))[0]
    return latents


def plain(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    """The same without guidance."""
    return drawn(pipe, name, **{**unguided(pipe), **changes})


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())
