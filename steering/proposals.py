"""Proposals: what changes the steps of scored calls after the selection, so that duplicates diverge.

Churn is noise for solvers that add none. At a scored call the solver's own step is replaced by the universal
ancestral step (`diffplug.transition`)

    x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps_hat + tau z,    tau^2 = eta^2 sigma_s^2 (1 - e^-2h)

and the solver stays deterministic elsewhere. Every particle is churned at a scored call, moved or not: so the
chain that is steered is one fixed chain, its weights stay exact, and no group depends on another.

A twist leans the noise of a scored step towards what the reward likes. The mean of the solver's Gaussian step
N(m, s^2) moves by s^2 g with g = strength * J * grad_x0 r, where J is the slope of the clean prediction at
the next level. The weights get the exact log ratio

    log p / tau = -s <g, z> - s^2 |g|^2 / 2          z: the noise that the solver drew

so the filter is exact for every g (twisted diffusion sampler, arXiv 2306.17775). Only the decoder and the
reward are differentiated, never the network.

`Churn` and `Twist` are what a person asks for; `ChurnedSteps` and `TwistedSteps` do it in one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_number
from diffplug.intercept import StepCall
from diffplug.noise.families import KNOWN, Level, step_kernel
from diffplug.noise.gaussian_step import NormalForm, ancestral_form
from diffplug.noise.stochastic import forget, takes_churn
from diffplug.seeds import particle_seed
from diffplug.steering.engine.rule import ScoredStep
from diffplug.transition import Transition, transition


class Proposal:
    """Base of proposals in a run, which changes nothing; the engine calls the methods in the order below."""

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Prepare for a run of this many prompts, with these slots of each."""

    def before(self, step: ScoredStep) -> None:
        """Look at a scored step, its particles moved already."""

    def after(self, call: StepCall, result: Any) -> tuple[Any, Tensor | None]:
        """Return what a step of the run returns, and log p/tau `[n]` where it is not the solver's own."""
        return result, None


def stepped(result: Any) -> Tensor:
    """Return the next sample of a step's result, tuple or output."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def replaced(result: Any, x: Tensor) -> Any:
    """Return a step's result with another next sample, in the type of its own."""
    if isinstance(result, tuple):
        return (x.to(result[0].dtype), *result[1:])
    result.prev_sample = x.to(result.prev_sample.dtype)
    return result


@dataclass(frozen=True)
class Churn:
    """Ask for noise at the scored calls of a solver that adds none itself.

    eta: in (0, 1]; 1 gives the noise of ancestral sampling, less keeps more of the solver's direction. Raises
    ValueError for anything else, and before the run for solvers that do not take churn.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_number("churn", self.eta)
        if not (math.isfinite(self.eta) and 0 < self.eta <= 1):
            raise ValueError(f"churn={self.eta}: give a number in (0, 1], or proposal=None for none")

    def check(self, scheduler: Any) -> None:
        """Raise ValueError for solvers where noise in between is undone or breaks their groups of steps."""
        if not takes_churn(scheduler):
            churned = sorted(name for name, row in KNOWN.items() if row.churn)
            raise ValueError(
                f"{type(scheduler).__name__} cannot be churned: take one of {', '.join(churned)}, "
                "or a stochastic solver without churn"
            )


@dataclass(frozen=True)
class Twist:
    """Ask for steps that lean towards the gradient of a differentiable reward; the solver must add noise.

    Costs one decoding with gradient more for each scored call. cap: the most that |s g| may be, in standard
    deviations of the step's noise summed over dimensions; without a cap the weights of high-dimensional
    states degenerate. spread: standard deviation of clean latents, for the slope J = alpha spread^2 /
    (alpha^2 spread^2 + sigma^2); 1 fits autoencoders. Raises ValueError for cap or spread <= 0, and before
    the run for solvers whose step is not a known Gaussian.
    """

    cap: float = 2.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_number("twist", self.cap)
        check_number("spread", self.spread)
        if not self.cap > 0:
            raise ValueError(f"twist={self.cap}: the cap must be above 0 (proposal=None is without twist)")
        if not (math.isfinite(self.spread) and self.spread > 0):
            raise ValueError(f"spread={self.spread}: it must be a finite number above 0")

    def check(self, scheduler: Any) -> None:
        """Raise ValueError for solvers whose step is not a known Gaussian."""
        step_kernel(scheduler)


_STREAM = 1 << 20  # of the particles' churn, away from the streams of the selections


class ChurnedSteps(Proposal):
    """Makes the steps of scored calls ancestral with strength eta.

    seeds: from the number of prompts to one seed for each; every particle has its own stream. Solvers with a
    corrector (UniPC, SA-Solver) forget the sample they would correct from, which would take about half of the
    noise out again; Heun is churned after its second stage.
    """

    def __init__(self, churn: Churn, seeds: Callable[[int], Sequence[int]]) -> None:
        self.churn, self.seeds = churn, seeds
        self._streams: list[torch.Generator] = []
        self._pending: tuple[NormalForm, ScoredStep, Tensor] | None = None

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Start the streams of a run."""
        self.churn.check(scheduler)
        self._pending = None
        self._streams = [
            torch.Generator().manual_seed(particle_seed(seed, _STREAM + slot))
            for seed in self.seeds(groups)
            for slot in slots
        ]

    def before(self, step: ScoredStep) -> None:
        """Work out the ancestral step of this call."""
        if step.here is not None and step.there is not None:
            self._pending = ancestral_form(step.here, step.there, self.churn.eta), step, step.call.sample

    def after(self, call: StepCall, result: Any) -> tuple[Any, Tensor | None]:
        """Return the ancestral step's result in place of the solver's, once its stages are done."""
        if self._pending is None or not getattr(call.scheduler, "state_in_first_order", True):
            return result, None
        (form, step, x), self._pending = self._pending, None
        x0 = step.x0
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in self._streams]).to(x0)
        forget(call.scheduler)
        x = form.a * x0 + form.b * x.to(x0.dtype) + form.s * noise
        return replaced(result, x), None


class TwistedSteps(Proposal):
    """Shifts the steps of scored calls by the reward's gradient.

    gradient: from clean latents `[n, ...]` to grad r, same shape. strength: lambda. rising: scale g by the
    progress of the run, as the rising tilt does.
    """

    def __init__(
        self,
        twist: Twist,
        gradient: Callable[[Tensor], Tensor],
        *,
        strength: float,
        rising: bool = False,
    ) -> None:
        self.twist, self.gradient = twist, gradient
        self.strength, self.rising = strength, rising
        self._pending: tuple[Transition, Tensor] | None = None

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Forget the last run."""
        self._pending = None

    def before(self, step: ScoredStep) -> None:
        """Work out the step's Gaussian and its shift."""
        call = step.call
        gaussian = transition(call.scheduler, call.model_output, call.timestep, call.sample, **call.kwargs)
        if gaussian.std == 0 or step.there is None:
            return
        slope = self.strength * posterior_slope(step.there, self.twist.spread)
        g = slope * (step.progress if self.rising else 1.0) * self.gradient(step.x0).to(gaussian.mean)
        size = gaussian.std * g.flatten(1).norm(dim=1)
        shrink = (self.twist.cap / size.clamp(min=1e-30)).clamp(max=1.0)
        self._pending = gaussian, g * shrink.reshape(-1, *(1,) * (g.ndim - 1))

    def after(self, call: StepCall, result: Any) -> tuple[Any, Tensor | None]:
        """Return the shifted result, and its log ratio `[n]` float64."""
        if self._pending is None:
            return result, None
        (gaussian, g), self._pending = self._pending, None
        x, s = stepped(result), gaussian.std
        z = (x.to(gaussian.mean) - gaussian.mean) / s
        inner = (g * z).flatten(1).sum(1).double()
        ratio = -s * inner - 0.5 * s * s * g.flatten(1).double().square().sum(1)
        return replaced(result, x.to(gaussian.mean) + s * s * g), ratio


def posterior_slope(there: Level, spread: float) -> float:
    """Return d x0hat / d x at a level, for Gaussian clean data of standard deviation `spread`."""
    v = spread * spread
    return there.alpha * v / (there.alpha**2 * v + there.sigma**2)


def reward_gradient(rate: Callable[[Tensor, slice], Tensor], x0: Tensor, batch_size: int) -> Tensor:
    """Return grad r of every row, `batch_size` rows at a time.

    rate: from clean latents and the rows they are to rewards `[b]` that carry a graph. Raises ValueError
    where they do not.
    """
    slopes = []
    for start in range(0, len(x0), batch_size):
        rows = slice(start, start + batch_size)
        with torch.enable_grad():
            part = x0[rows].detach().requires_grad_(True)
            rewards = rate(part, rows)
            if not (isinstance(rewards, Tensor) and rewards.requires_grad):
                raise ValueError(
                    "the reward has no gradient with respect to its images: a twist needs a differentiable "
                    "reward that returns a tensor; leave it out for others"
                )
            slopes.append(torch.autograd.grad(rewards.sum(), part)[0])
    return torch.cat(slopes)
