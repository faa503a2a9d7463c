"""Steering: several particles per prompt, selected while they are denoised by what a reward likes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "diffplug.steering":
    raise ImportError("import this package as diffplug.steering, not as a top-level package")

if TYPE_CHECKING:
    from diffplug.steering.best_of_n import BestOfN
    from diffplug.steering.feynman_kac import FeynmanKac
    from diffplug.steering.report import SteeringReport
    from diffplug.steering.resampling import resample
    from diffplug.steering.weights import ess

_HOMES = {
    "BestOfN": "diffplug.steering.best_of_n",
    "FeynmanKac": "diffplug.steering.feynman_kac",
    "SteeringReport": "diffplug.steering.report",
    "ess": "diffplug.steering.weights",
    "resample": "diffplug.steering.resampling",
}

__all__ = ["BestOfN", "FeynmanKac", "SteeringReport", "ess", "resample"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
