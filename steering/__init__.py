"""Steering: several particles per prompt, selected while they are denoised by what a reward likes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if __name__ != "diffplug.steering":
    raise ImportError("import this package as diffplug.steering, not as a top-level package")

if TYPE_CHECKING:
    from diffplug.noise.stochastic import stochastic as stochastic
    from diffplug.steering.clips import ClipSelection as ClipSelection
    from diffplug.steering.crowd.crowd import Crowd as Crowd
    from diffplug.steering.crowd.ragged import Ragged as Ragged
    from diffplug.steering.crowd.result import CrowdResult as CrowdResult
    from diffplug.steering.engine.ranks import Ranks as Ranks
    from diffplug.steering.masked_sequences import MaskedDiffusionScheduler as MaskedDiffusionScheduler
    from diffplug.steering.masked_sequences import MaskedSequencePipeline as MaskedSequencePipeline
    from diffplug.steering.parts import Network as Network
    from diffplug.steering.parts import Resampling as Resampling
    from diffplug.steering.parts import Scoring as Scoring
    from diffplug.steering.proposals import Churn as Churn
    from diffplug.steering.proposals import Twist as Twist
    from diffplug.steering.report import SteeringReport as SteeringReport
    from diffplug.steering.rules.auto import Auto as Auto
    from diffplug.steering.rules.beam import Beam as Beam
    from diffplug.steering.rules.best_of_n import BestOfN as BestOfN
    from diffplug.steering.rules.feynman_kac import FeynmanKac as FeynmanKac
    from diffplug.steering.rules.feynman_kac import ImportanceSampling as ImportanceSampling
    from diffplug.steering.rules.noise_search import NoiseSearch as NoiseSearch
    from diffplug.steering.rules.svdd import SVDD as SVDD
    from diffplug.steering.rules.svdd import CoDe as CoDe
    from diffplug.steering.rules.svdd import TwoLevel as TwoLevel
    from diffplug.steering.smc.potentials import Adaptive as Adaptive
    from diffplug.steering.smc.resampling import resample as resample
    from diffplug.steering.smc.weights import ess as ess
    from diffplug.steering.values.fitting import fit_value as fit_value
    from diffplug.steering.values.learned import LearnedValue as LearnedValue
    from diffplug.steering.values.many_samples import ManySamples as ManySamples

_HOMES = {
    "Adaptive": "diffplug.steering.smc.potentials",
    "Auto": "diffplug.steering.rules.auto",
    "Beam": "diffplug.steering.rules.beam",
    "BestOfN": "diffplug.steering.rules.best_of_n",
    "Churn": "diffplug.steering.proposals",
    "ClipSelection": "diffplug.steering.clips",
    "CoDe": "diffplug.steering.rules.svdd",
    "Crowd": "diffplug.steering.crowd.crowd",
    "CrowdResult": "diffplug.steering.crowd.result",
    "FeynmanKac": "diffplug.steering.rules.feynman_kac",
    "ImportanceSampling": "diffplug.steering.rules.feynman_kac",
    "LearnedValue": "diffplug.steering.values.learned",
    "ManySamples": "diffplug.steering.values.many_samples",
    "MaskedDiffusionScheduler": "diffplug.steering.masked_sequences",
    "MaskedSequencePipeline": "diffplug.steering.masked_sequences",
    "Network": "diffplug.steering.parts",
    "NoiseSearch": "diffplug.steering.rules.noise_search",
    "Ragged": "diffplug.steering.crowd.ragged",
    "Ranks": "diffplug.steering.engine.ranks",
    "Resampling": "diffplug.steering.parts",
    "SVDD": "diffplug.steering.rules.svdd",
    "Scoring": "diffplug.steering.parts",
    "SteeringReport": "diffplug.steering.report",
    "Twist": "diffplug.steering.proposals",
    "TwoLevel": "diffplug.steering.rules.svdd",
    "ess": "diffplug.steering.smc.weights",
    "fit_value": "diffplug.steering.values.fitting",
    "resample": "diffplug.steering.smc.resampling",
    "stochastic": "diffplug.noise.stochastic",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
