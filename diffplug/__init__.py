"""Plug-ins that make Diffusers pipelines faster, steered by a reward, or tuned.

    with diffplug.plug(pipe, DCSolver(), FeynmanKac(reward, particles=8)):
        image = pipe("a red circle left of a blue square", num_inference_steps=6).images[0]

Importing this module costs milliseconds: torch, diffusers and the wings load when a name is first used.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffplug.moved import MOVED, keep_old_names

if TYPE_CHECKING:
    from diffplug.apply import apply as apply
    from diffplug.apply import restore as restore
    from diffplug.loading import load as load
    from diffplug.network.siblings import sibling as sibling
    from diffplug.plug import plug as plug

__version__ = "0.2.0"

_FUNCTIONS = {
    "apply": "diffplug.apply",
    "load": "diffplug.loading",
    "plug": "diffplug.plug",
    "restore": "diffplug.apply",
    "sibling": "diffplug.network.siblings",
}
_MODULES = (
    "files",
    "intercept",
    "latents",
    "making",
    "network",
    "noise",
    "recipe",
    "registry",
    "rewards",
    "samplers",
    "scheduler",
    "seeds",
    "shapes",
    "steering",
    "testing",
    "training",
    "transition",
)
__all__ = [*sorted(_FUNCTIONS), *_MODULES]

if not os.path.isdir(os.path.join(__path__[0], "samplers")):  # a checkout: the wings lie beside this folder
    __path__.append(os.path.dirname(__path__[0]))


class _Package(ModuleType):
    """The package itself; `diffplug.plug` stays the function when the module of that name gets imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in _MODULES or name in MOVED:
        return import_module(f"diffplug.{name}")
    raise AttributeError(f"module 'diffplug' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
keep_old_names()
