"""Tiny pipelines of the real classes with random weights, built in memory: for tests without a network."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

import torch

_FAMILIES = "diffplug.testing.families"
_TRANSFORMERS = "diffplug.testing.transformer_families"
_BUILDERS = {
    "sd15": (_FAMILIES, "sd15"),
    "sd15-img2img": (_FAMILIES, "sd15_img2img"),
    "controlnet": (_FAMILIES, "controlnet"),
    "lcm": (_FAMILIES, "lcm"),
    "sdxl": (_FAMILIES, "sdxl"),
    "ddpm": (_FAMILIES, "ddpm"),
    "sd3": (_TRANSFORMERS, "sd3"),
    "flux": (_TRANSFORMERS, "flux"),
    "qwenimage": (_TRANSFORMERS, "qwenimage"),
    "wan": (_TRANSFORMERS, "wan"),
    "pixart": (_TRANSFORMERS, "pixart"),
}
_PROMPT = "a red circle"
_SMALL = {"height": 16, "width": 16}


class Tiny:
    """`tiny(name)` is a small random pipeline of a family; `tiny.names()` lists the families."""

    def __call__(self, name: str, seed: int = 0) -> Any:
        """A `DiffusionPipeline` of the family `name`, in evaluation mode, float32, on the CPU.

        Takes well under a second, reads no file and no network. The same seed gives the same weights; the
        global random state is left as it was. `pipe(**tiny.inputs(name))` runs it in under a second.
        ValueError: there is no such family.
        """
        module, function = self._builder(name)
        build = getattr(import_module(module), function)
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
        return sorted(_BUILDERS)

    def inputs(self, name: str, **changes: Any) -> dict[str, Any]:
        """Arguments with which the pipeline of a family runs quickly: two steps, tensors out."""
        self._builder(name)
        common = {"num_inference_steps": 2, "output_type": "pt"}
        return {**common, **_inputs(name), **changes}

    def _builder(self, name: str) -> tuple[str, str]:
        if name not in _BUILDERS:
            near = difflib.get_close_matches(name, _BUILDERS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"There is no tiny pipeline {name!r}: {hint}The families are {', '.join(self.names())}."
            )
        return _BUILDERS[name]


tiny = Tiny()


def _inputs(name: str) -> dict[str, Any]:
    if name == "ddpm":
        return {"batch_size": 1}
    if name in ("sd15-img2img", "controlnet"):
        noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        extra = {"strength": 1.0} if name == "sd15-img2img" else {}
        return {"prompt": _PROMPT, "image": noise, **extra}
    if name == "wan":
        return {"prompt": _PROMPT, **_SMALL, "num_frames": 5, "max_sequence_length": 16}
    if name == "qwenimage":  # one token a letter: the template alone is longer than most prompts
        return {"prompt": _PROMPT, **_SMALL, "max_sequence_length": 256}
    if name in ("sd3", "flux"):
        return {"prompt": _PROMPT, **_SMALL, "max_sequence_length": 16}
    if name == "pixart":
        return {"prompt": _PROMPT, "use_resolution_binning": False, "clean_caption": False}
    return {"prompt": _PROMPT}


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


@torch.no_grad()
def _fill_zero_weights(module: torch.nn.Module) -> None:
    """Gives small random numbers to matrices that start at zero, lest a part of the network do nothing."""
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=0.05)
