"""Negative prompts at one evaluation a step: NAG, SpeedUpNet, guidance in part of a run; one plug for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.negative.guidance import NegativeGuidance as NegativeGuidance
    from diffplug.samplers.negative.nag import NAG as NAG
    from diffplug.samplers.negative.speedupnet import SpeedUpNet as SpeedUpNet
    from diffplug.samplers.negative.sun_adapter import SunAdapter as SunAdapter
    from diffplug.samplers.negative.sun_file import load_adapter as load_adapter
    from diffplug.samplers.negative.sun_file import save_adapter as save_adapter

_HOMES = {
    "NAG": "diffplug.samplers.negative.nag",
    "NegativeGuidance": "diffplug.samplers.negative.guidance",
    "SpeedUpNet": "diffplug.samplers.negative.speedupnet",
    "SunAdapter": "diffplug.samplers.negative.sun_adapter",
    "load_adapter": "diffplug.samplers.negative.sun_file",
    "save_adapter": "diffplug.samplers.negative.sun_file",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
