"""Searches: few-step solvers found for a person's own model, steps and guidance."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.samplers.search.compensation import search_compensation
    from diffplug.samplers.search.front import search_front
    from diffplug.samplers.search.schedule_search import search_schedule
    from diffplug.samplers.search.tuning import tune_schedule

__all__ = ["search_compensation", "search_front", "search_schedule", "tune_schedule"]

_HOMES = {
    "search_compensation": "compensation",
    "search_front": "front",
    "search_schedule": "schedule_search",
    "tune_schedule": "tuning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"diffplug.samplers.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
