"""Few-step checkpoints by name: a catalogue of recipes, and the plug that sets one on a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.samplers.few_step.catalogue import Row as Row
    from diffplug.samplers.few_step.catalogue import Weights as Weights
    from diffplug.samplers.few_step.families import family_of as family_of
    from diffplug.samplers.few_step.flow_tcd import FlowMatchTCDScheduler as FlowMatchTCDScheduler
    from diffplug.samplers.few_step.listed_ddim import ListedDDIMScheduler as ListedDDIMScheduler
    from diffplug.samplers.few_step.lookup import all_rows as all_rows
    from diffplug.samplers.few_step.lookup import knows as knows
    from diffplug.samplers.few_step.lookup import names as names
    from diffplug.samplers.few_step.plug import FewStep as FewStep
    from diffplug.samplers.few_step.plug import named as named

_HOMES = {
    "FewStep": "diffplug.samplers.few_step.plug",
    "FlowMatchTCDScheduler": "diffplug.samplers.few_step.flow_tcd",
    "ListedDDIMScheduler": "diffplug.samplers.few_step.listed_ddim",
    "Row": "diffplug.samplers.few_step.catalogue",
    "Weights": "diffplug.samplers.few_step.catalogue",
    "all_rows": "diffplug.samplers.few_step.lookup",
    "family_of": "diffplug.samplers.few_step.families",
    "knows": "diffplug.samplers.few_step.lookup",
    "named": "diffplug.samplers.few_step.plug",
    "names": "diffplug.samplers.few_step.lookup",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
