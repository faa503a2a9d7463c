"""Tuned models: rollout, score, select, objective, times a tuner. One file each; names load when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if __name__ != "diffplug.training":
    raise ImportError(f"import this package as diffplug.training, not as {__name__}")

if TYPE_CHECKING:
    from diffplug.training.tuners.sara.average import VectorAverage as VectorAverage
    from diffplug.training.tuners.sara.optimizer import SaRAAdamW as SaRAAdamW
    from diffplug.training.tuners.sara.probe import probe_threshold as probe_threshold
    from diffplug.training.tuners.sara.progressive import Progressive as Progressive
    from diffplug.training.tuners.sara.rank import RankTerm as RankTerm
    from diffplug.training.tuners.sara.sara import SaRA as SaRA
    from diffplug.training.tuners.sara.scores import activation_score as activation_score
    from diffplug.training.tuners.sara.scores import gradient_score as gradient_score

_HOMES = {
    "Progressive": "diffplug.training.tuners.sara.progressive",
    "RankTerm": "diffplug.training.tuners.sara.rank",
    "SaRA": "diffplug.training.tuners.sara.sara",
    "SaRAAdamW": "diffplug.training.tuners.sara.optimizer",
    "VectorAverage": "diffplug.training.tuners.sara.average",
    "activation_score": "diffplug.training.tuners.sara.scores",
    "gradient_score": "diffplug.training.tuners.sara.scores",
    "probe_threshold": "diffplug.training.tuners.sara.probe",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
