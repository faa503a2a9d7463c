"""The three numbers a, b, s of a scheduler's step: x_next ~ N(a x0hat + b x, s^2 I).

Each scheduler's own numbers stand with its family, in float64 on the host, from its tables alone: no network
output is needed.
Sources: the formulas of each class, brought to the normal form of PSO (arXiv 2410.03190) and DDIM (arXiv
2010.02502, eq. 12, 16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffplug.noise.noise_level import Level
from diffplug.noise.position import StepPosition, host


@dataclass(frozen=True, kw_only=True)
class NormalForm:
    """The numbers of one step: x_next = a x0 + b x + sum_j history[j] x0_j + s noise.

    history: weights of the earlier clean predictions, latest first; empty for one-step kernels.
    slack: weight of (clipped - unclipped x0hat), for DDIM whose direction ignores clipping; acts only where
    it clips.
    advice: which argument makes the step stochastic, for the error of a step with s = 0.
    """

    a: float
    b: float
    s: float
    history: tuple[float, ...] = ()
    slack: float = 0.0
    advice: str = ""

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) for v in (self.a, self.b, self.s, self.slack, *self.history))
        if not finite or self.s < 0:
            raise ValueError(f"a step needs finite a, b and s >= 0, got {self.a}, {self.b} and {self.s}")

    @property
    def kl_weight(self) -> float:
        """omega = a^2 / (2 s^2): KL between two steps per squared difference of x0hat; infinite at s = 0."""
        return math.inf if self.s == 0 else self.a**2 / (2 * self.s**2)


def bridge(here: Level, there: Level, tau2: float) -> tuple[float, float]:
    """Return (a, b) of a step that keeps the marginals when noise of variance ``tau2`` is added."""
    left = there.sigma**2 - tau2
    if left < -1e-12 * max(1.0, there.sigma**2):
        raise ValueError(
            f"noise of variance {tau2:g} is more than the {there.sigma**2:g} of the next level: lower eta"
        )
    b = math.sqrt(max(left, 0.0)) / here.sigma
    return there.alpha - here.alpha * b, b


def ancestral_form(here: Level, there: Level, eta: float) -> NormalForm:
    """Return the universal ancestral step between levels, tau^2 = eta^2 sigma_s^2 (1 - e^-2h); eta 0 is DDIM.

    Covariant under rescaling of x; well defined from pure noise (alpha_t 0) and to a clean end (sigma_s 0).
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}, allowed is a number >= 0 (0 deterministic, 1 fully ancestral)")
    if here.sigma <= 0:
        raise ValueError("the state is clean already (sigma = 0): there is no step to take from here")
    shrink = here.alpha * there.sigma / here.sigma  # alpha_s e^-h
    if shrink > there.alpha * (1 + 1e-9) or there.alpha <= 0:
        raise ValueError(f"the step from {here} to {there} adds noise: pass the less noisy level as `there`")
    fresh = max(1.0 - (shrink / there.alpha) ** 2, 0.0)
    tau = eta * there.sigma * math.sqrt(fresh)
    a, b = bridge(here, there, tau * tau)
    return NormalForm(a=a, b=b, s=tau, advice="eta > 0")


def sigma_pair(scheduler: Any, at: StepPosition) -> tuple[float, float]:
    i = at.index(scheduler)
    return host(scheduler.sigmas, i), host(scheduler.sigmas, i + 1)


def with_advice(form: NormalForm, advice: str) -> NormalForm:
    return NormalForm(a=form.a, b=form.b, s=form.s, advice=advice)
