"""The public kit for testing plug-ins: tiny offline pipelines, and the laws that plug-ins must hold.

pipe = tiny("sdxl")              a random pipeline of a family, built in memory in under a second
check_sampler(MyScheduler)       the laws of samplers
check_steerer(make_steerer)      the laws of steerers
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.testing.check_sampler import SAMPLER_LAWS as SAMPLER_LAWS
    from diffplug.testing.check_sampler import check_sampler as check_sampler
    from diffplug.testing.check_steerer import STEERER_LAWS as STEERER_LAWS
    from diffplug.testing.check_steerer import check_steerer as check_steerer
    from diffplug.testing.tiny import tiny as tiny

_HOMES = {
    "tiny": "tiny",
    "check_sampler": "check_sampler",
    "SAMPLER_LAWS": "check_sampler",
    "check_steerer": "check_steerer",
    "STEERER_LAWS": "check_steerer",
}
__all__ = ["SAMPLER_LAWS", "STEERER_LAWS", "check_sampler", "check_steerer", "tiny"]


class _Kit(ModuleType):
    """The kit itself; a name like `tiny` stays the function when the module of that name gets imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"diffplug.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diffplug.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Kit
