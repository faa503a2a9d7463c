"""Steering: several particles per prompt, selected while they are denoised by what a reward likes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "diffplug.steering":
    raise ImportError("import this package as diffplug.steering, not as a top-level package")

if TYPE_CHECKING:
    from diffplug.steering.beam import Beam
    from diffplug.steering.best_of_n import BestOfN
    from diffplug.steering.feynman_kac import FeynmanKac, ImportanceSampling
    from diffplug.steering.learned_value import LearnedValue
    from diffplug.steering.masked import MaskedDiffusionScheduler, MaskedSequencePipeline
    from diffplug.steering.noise_search import NoiseSearch
    from diffplug.steering.ranks import Ranks
    from diffplug.steering.report import SteeringReport
    from diffplug.steering.resampling import resample
    from diffplug.steering.solvers import stochastic
    from diffplug.steering.svdd import SVDD, CoDe, TwoLevel
    from diffplug.steering.value_fitting import fit_value
    from diffplug.steering.values import ManySamples
    from diffplug.steering.weights import ess

_HOMES = {
    "Beam": "diffplug.steering.beam",
    "BestOfN": "diffplug.steering.best_of_n",
    "CoDe": "diffplug.steering.svdd",
    "FeynmanKac": "diffplug.steering.feynman_kac",
    "ImportanceSampling": "diffplug.steering.feynman_kac",
    "LearnedValue": "diffplug.steering.learned_value",
    "ManySamples": "diffplug.steering.values",
    "MaskedDiffusionScheduler": "diffplug.steering.masked",
    "MaskedSequencePipeline": "diffplug.steering.masked",
    "NoiseSearch": "diffplug.steering.noise_search",
    "Ranks": "diffplug.steering.ranks",
    "SVDD": "diffplug.steering.svdd",
    "SteeringReport": "diffplug.steering.report",
    "TwoLevel": "diffplug.steering.svdd",
    "ess": "diffplug.steering.weights",
    "fit_value": "diffplug.steering.value_fitting",
    "resample": "diffplug.steering.resampling",
    "stochastic": "diffplug.steering.solvers",
}

__all__ = [
    "SVDD",
    "Beam",
    "BestOfN",
    "CoDe",
    "FeynmanKac",
    "ImportanceSampling",
    "LearnedValue",
    "ManySamples",
    "MaskedDiffusionScheduler",
    "MaskedSequencePipeline",
    "NoiseSearch",
    "Ranks",
    "SteeringReport",
    "TwoLevel",
    "ess",
    "fit_value",
    "resample",
    "stochastic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
