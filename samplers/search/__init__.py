"""Searches: few-step solvers found for a person's own model, steps and guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.samplers.search.compensation import search_compensation

__all__ = ["search_compensation"]


def __getattr__(name: str) -> Any:
    if name == "search_compensation":
        from diffplug.samplers.search.compensation import search_compensation

        return search_compensation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
