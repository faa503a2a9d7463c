"""Bookkeeping as the published code of Feynman-Kac steering does it, for comparison only; do not use it.

Four differences to `FeynmanKac`, each of them a switch: particles are copied after the step (the copies share
its noise), weights are forgotten where nothing was resampled, the draw is multinomial, and the potential is
the running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffplug.intercept import StepCall
from diffplug.steering import Adaptive, Resampling
from diffplug.steering.engine.denoised import scored_step
from diffplug.steering.engine.request import Request
from diffplug.steering.engine.rule import Filter
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.step import ParticleSteps
from diffplug.steering.proposals import replaced, stepped
from diffplug.steering.rules.feynman_kac import FeynmanKac
from diffplug.steering.smc.filter import ParticleFilter, Selection

PUBLISHED = Resampling("multinomial", ess_threshold=0.5, islands=1)


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
        if self.population is None:
            self.population = self._begun(call)
        index = self.made
        self.made += 1
        if not self.population.is_due(index):
            return call.run()
        step = scored_step(call, index, self.steps, self.ahead)
        result = call.run()
        rows = self.population.select(self.score(step), index)
        return result if rows is None else replaced(result, rows.take(stepped(result)))


class _PublishedRun(SteeredRun):
    def __init__(self, steering: Any, pipe: Any, request: Request, slots: Slots) -> None:
        super().__init__(steering, pipe, request, slots)
        self.engine = Lagging(steering, self.scorer, watch=self.engine.watch)


@dataclass(frozen=True)
class PublishedFeynmanKac(FeynmanKac):
    """The published rule with its defaults: one population, maximum, multinomial, ESS below .5, full tilt."""

    potential: str = "max"
    tilt: str | Adaptive = "constant"
    selection: Resampling = PUBLISHED

    def build_run(self, pipe: Any, request: Request, slots: Slots) -> SteeredRun:
        """Return a run whose engine lags."""
        return _PublishedRun(self, pipe, request, slots)

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh filter that drops weights."""
        found = super().build_filter(groups)
        if isinstance(found, ParticleFilter):
            found.__class__ = Dropping
        return found
