"""Few-step checkpoints by name: a catalogue of recipes, and the plug that sets one on a pipeline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.samplers.few_step.catalogue import Row, Weights
    from diffplug.samplers.few_step.families import family_of
    from diffplug.samplers.few_step.flow_tcd import FlowMatchTCDScheduler
    from diffplug.samplers.few_step.listed_ddim import ListedDDIMScheduler
    from diffplug.samplers.few_step.lookup import all_rows, knows, names
    from diffplug.samplers.few_step.plug import FewStep, named

__all__ = [
    "FewStep",
    "FlowMatchTCDScheduler",
    "ListedDDIMScheduler",
    "Row",
    "Weights",
    "all_rows",
    "family_of",
    "knows",
    "named",
    "names",
]

_HOMES = {
    "FewStep": "plug",
    "FlowMatchTCDScheduler": "flow_tcd",
    "ListedDDIMScheduler": "listed_ddim",
    "Row": "catalogue",
    "Weights": "catalogue",
    "all_rows": "lookup",
    "family_of": "families",
    "knows": "lookup",
    "named": "plug",
    "names": "lookup",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffplug.samplers.few_step.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
