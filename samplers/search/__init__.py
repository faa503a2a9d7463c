"""Searches: few-step solvers found for a person's own model, steps and guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.search.front import search_front as search_front
    from diffplug.samplers.search.search import search_compensation as search_compensation
    from diffplug.samplers.search.search import search_schedule as search_schedule
    from diffplug.samplers.search.search import tune_schedule as tune_schedule

_NAMES = ("search_compensation", "search_schedule", "tune_schedule")
_HOMES = {
    **dict.fromkeys(_NAMES, "diffplug.samplers.search.search"),
    "search_front": "diffplug.samplers.search.front",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
