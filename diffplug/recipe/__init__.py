"""A recipe: how to make pictures (sampler, steps, guidance, steering), as one value for any pipeline.

Its texts lie beside it: a line of settings, the parameters that other programs write, files of prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.recipe.recipe import Pictures as Pictures
    from diffplug.recipe.recipe import Recipe as Recipe

_HOMES = {"Pictures": "diffplug.recipe.recipe", "Recipe": "diffplug.recipe.recipe"}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
