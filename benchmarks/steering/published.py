"""Bookkeeping as the published code of Feynman-Kac steering does it, for comparison only; do not use it.

Four differences to `FeynmanKac`, each of them a switch: particles are copied after the step (the copies share
its noise), weights are forgotten where nothing was resampled, the draw is multinomial, and the potential is
the running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffplug.intercept import StepCall
from diffplug.steering.engine.denoised import clean_prediction
from diffplug.steering.engine.history import reindex
from diffplug.steering.engine.ranks import Ranks
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.step import Filter, ParticleSteps
from diffplug.steering.proposals import replaced, stepped
from diffplug.steering.rules.feynman_kac import FeynmanKac
from diffplug.steering.smc.filter import ParticleFilter, Selection


class Dropping(ParticleFilter):
    """Forgets the weights at every scored call, resampled or not."""

    def select(self, *args: Any, **kwargs: Any) -> Selection:
        """Return the selection."""
        selection = super().select(*args, **kwargs)
        self.base = self.psi.clone()
        return selection


class Lagging(ParticleSteps):
    """Steps first and copies afterwards; the history stays where it was."""

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result, its rows those of the survivors."""
        if self.filter is None:
            self._begin(call)
        index = self.made
        self.made += 1
        if not self._is_due(call.scheduler, index):
            return call.run()
        x0 = clean_prediction(call)
        result = call.run()
        self.now = call
        rows = self._select(self.score(x0, index), index, (index + 1) / self.steps)
        return result if rows is None else replaced(result, reindex(stepped(result), rows))


class _PublishedRun(SteeredRun):
    def __init__(self, steerer: Any, pipe: Any, request: Request, ranks: Ranks | None = None) -> None:
        super().__init__(steerer, pipe, request, ranks)
        own = self.engine
        self.engine = Lagging(
            own.build_filter, own.score, particles=steerer.particles, calls=own.plan, watch=own.watch
        )


@dataclass(frozen=True)
class PublishedFeynmanKac(FeynmanKac):
    """The published rule with its defaults: one population, maximum, multinomial, ESS below .5, full tilt."""

    potential: str = "max"
    resampler: str = "multinomial"
    ess_threshold: float | None = 0.5
    tilt: str = "constant"
    populations: int | None = 1

    def build_run(self, pipe: Any, request: Request, ranks: Ranks | None) -> SteeredRun:
        """Return a run whose engine lags."""
        return _PublishedRun(self, pipe, request, ranks)

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter that drops weights."""
        found = super().build_filter(groups)
        if isinstance(found, ParticleFilter):
            found.__class__ = Dropping
        return found
