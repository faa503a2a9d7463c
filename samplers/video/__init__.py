"""Video: a picture first, windows over a long clip, and clips that continue each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.video.chain import ImageThenVideo as ImageThenVideo
    from diffplug.samplers.video.drift import DriftReport as DriftReport
    from diffplug.samplers.video.long_video import LongVideo as LongVideo
    from diffplug.samplers.video.windows import Windows as Windows

_HOMES = {
    "DriftReport": "diffplug.samplers.video.drift",
    "ImageThenVideo": "diffplug.samplers.video.chain",
    "LongVideo": "diffplug.samplers.video.long_video",
    "Windows": "diffplug.samplers.video.windows",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
