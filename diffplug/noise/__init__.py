"""Signal and noise levels of any scheduler, and the clean prediction x0hat from any network output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.noise.families import FLOW as FLOW
    from diffplug.noise.families import Family as Family
    from diffplug.noise.families import Reading as Reading
    from diffplug.noise.families import family as family
    from diffplug.noise.families import level as level
    from diffplug.noise.families import levels as levels
    from diffplug.noise.families import next_level as next_level
    from diffplug.noise.families import reading as reading
    from diffplug.noise.families import step_count as step_count
    from diffplug.noise.families import x0hat as x0hat
    from diffplug.noise.noise_level import CLEAN as CLEAN
    from diffplug.noise.noise_level import Level as Level
    from diffplug.noise.stochastic import adds_noise as adds_noise

_HOMES = {
    "CLEAN": "diffplug.noise.noise_level",
    "FLOW": "diffplug.noise.families",
    "Family": "diffplug.noise.families",
    "Level": "diffplug.noise.noise_level",
    "Reading": "diffplug.noise.families",
    "adds_noise": "diffplug.noise.stochastic",
    "family": "diffplug.noise.families",
    "level": "diffplug.noise.families",
    "levels": "diffplug.noise.families",
    "next_level": "diffplug.noise.families",
    "reading": "diffplug.noise.families",
    "step_count": "diffplug.noise.families",
    "x0hat": "diffplug.noise.families",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
