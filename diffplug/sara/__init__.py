"""Sparse deltas of a model's smallest weights (SaRA, arXiv 2409.06633): their files, on and off a model.

    with plug(pipe, SaRAWeights("style.sara.safetensors", scale=0.8)):
        image = pipe("a red circle").images[0]

Training them is `diffplug.training.SaRA`. Names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.sara.delta import Delta as Delta
    from diffplug.sara.delta import SparseDelta as SparseDelta
    from diffplug.sara.dense import sara_to_checkpoint as sara_to_checkpoint
    from diffplug.sara.file import load_delta as load_delta
    from diffplug.sara.file import save_delta as save_delta
    from diffplug.sara.loaded import load_sara as load_sara
    from diffplug.sara.loaded import loaded_sara as loaded_sara
    from diffplug.sara.loaded import set_sara_scale as set_sara_scale
    from diffplug.sara.loaded import unload_sara as unload_sara
    from diffplug.sara.merge import merge_sara as merge_sara
    from diffplug.sara.plug import SaRAWeights as SaRAWeights
    from diffplug.sara.published import read_published as read_published
    from diffplug.sara.supertuning import from_supertuning as from_supertuning
    from diffplug.sara.supertuning import to_supertuning as to_supertuning

_HOMES = {
    "Delta": "diffplug.sara.delta",
    "SaRAWeights": "diffplug.sara.plug",
    "SparseDelta": "diffplug.sara.delta",
    "from_supertuning": "diffplug.sara.supertuning",
    "load_delta": "diffplug.sara.file",
    "load_sara": "diffplug.sara.loaded",
    "loaded_sara": "diffplug.sara.loaded",
    "merge_sara": "diffplug.sara.merge",
    "read_published": "diffplug.sara.published",
    "sara_to_checkpoint": "diffplug.sara.dense",
    "save_delta": "diffplug.sara.file",
    "set_sara_scale": "diffplug.sara.loaded",
    "to_supertuning": "diffplug.sara.supertuning",
    "unload_sara": "diffplug.sara.loaded",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
