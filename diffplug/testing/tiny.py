"""Tiny pipelines of the real classes with random weights, built in memory: for tests without a network."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

import torch

from diffplug.testing.tiny_inputs import tiny_inputs

_HOMES = {
    "families": ("sd15 sd15-img2img sd15-inpaint controlnet lcm sdxl sdxl-img2img sdxl-inpaint kandinsky22"),
    "pixel_families": "ddpm ddim consistency deepfloyd-if",
    "transformer_families": "sd3 flux flux-schnell flux-img2img qwenimage pixart dit hunyuandit",
    "flow_families": "chroma flux2-klein z-image lumina2 auraflow sana sana-sprint",
    "video_families": "wan wan22 ltx cogvideox animatediff svd",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}


class Tiny:
    """`tiny(name)` is a small random pipeline of a family; `tiny.names()` lists the families."""

    def __call__(self, name: str, seed: int = 0) -> Any:
        """A `DiffusionPipeline` of the family `name`, in evaluation mode, float32, on the CPU.

        Takes well under a second, reads no file and no network. The same seed gives the same weights; the
        global random state is left as it was. `pipe(**tiny.inputs(name))` runs it in under a second.
        ValueError: there is no such family.
        """
        _check(name)
        build = getattr(import_module(f"diffplug.testing.{_MODULES[name]}"), name.replace("-", "_"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = build()
            for part in _modules(pipe):
                _fill_zero_weights(part)
        for part in _modules(pipe):
            part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def names(self) -> list[str]:
        """The families that there are."""
        return sorted(_MODULES)

    def inputs(self, name: str, **changes: Any) -> dict[str, Any]:
        """Arguments with which the pipeline of a family runs quickly: two steps, tensors out."""
        _check(name)
        return {**tiny_inputs(name), **changes}


def _check(name: str) -> None:
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"There is no tiny pipeline {name!r}: {hint}The families are {', '.join(sorted(_MODULES))}."
        )


tiny = Tiny()


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


@torch.no_grad()
def _fill_zero_weights(module: torch.nn.Module) -> None:
    """Gives small random numbers to matrices that start at zero, lest a part of the network do nothing."""
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=0.05)
