"""Proposals: what changes the steps of scored calls after the selection. The default changes nothing.

Churn is noise for solvers that add none, so that copied particles diverge. At a scored call the solver's own
step is replaced by the universal ancestral step (`diffplug.transition`)

    x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps_hat + tau z,    tau^2 = eta^2 sigma_s^2 (1 - e^-2h)

and the solver stays deterministic elsewhere. Every particle is churned at a scored call, moved or not: so the
chain that is steered is one fixed chain, its weights stay exact, and no group depends on another.

A twist leans the noise of a scored step towards what the reward likes. The mean of the solver's Gaussian step
N(m, s^2) moves by s^2 g with g = strength * J * grad_x0 r, where J is the slope of the clean prediction at
the next level. The weights get the exact log ratio

    log p / tau = -s <g, z> - s^2 |g|^2 / 2          z: the noise that the solver drew

so the filter is exact for every g (twisted diffusion sampler, arXiv 2306.17775). Only the decoder and the
reward are differentiated, never the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_number
from diffplug.intercept import StepCall
from diffplug.noise.families import KNOWN, Level, level, next_level
from diffplug.noise.stochastic import forget, takes_churn
from diffplug.seeds import particle_seed
from diffplug.transition import Transition, ancestral, transition


class Proposal:
    """Base of proposals; the engine calls `begin` once a run, and the others in the order below."""

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Prepare for a run of this many prompts, with these slots of each."""

    def before(self, call: StepCall, x0: Tensor, progress: float) -> None:
        """Look at a scored call, its particles moved already; x0: their clean predictions `[n, ...]`,
        progress: share of the run done.
        """

    def after(self, call: StepCall, result: Any) -> Any:
        """Return what the step returns, at every call of the run."""
        return result

    def log_ratio(self) -> Tensor | None:
        """Return log p/tau `[n]` of the last step for the weights; None where it was the solver's own."""
        return None


def stepped(result: Any) -> Tensor:
    """Return the next sample of a step's result, tuple or output."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def replaced(result: Any, x: Tensor) -> Any:
    """Return a step's result with another next sample."""
    if isinstance(result, tuple):
        return (x, *result[1:])
    result.prev_sample = x
    return result


_STREAM = 1 << 20  # of the particles' churn, away from the streams of the selections


class Churn(Proposal):
    """Makes the steps of scored calls ancestral with strength eta.

    eta: 1 gives the noise of ancestral sampling, less keeps more of the solver's direction. seeds: from the
    number of prompts to one seed for each; every particle has its own stream. Solvers with a
    corrector (UniPC, SA-Solver) forget the sample they would correct from, which would take about half of the
    noise out again; Heun is churned after its second stage. Raises ValueError for eta outside (0, 1] and for
    solvers that do not take it (`KNOWN` in `diffplug.noise.families`), where noise in between is undone or
    breaks their groups of steps.
    """

    def __init__(self, eta: float, seeds: Callable[[int], Sequence[int]]) -> None:
        check_eta(eta)
        self.eta, self.seeds = eta, seeds
        self._streams: list[torch.Generator] = []
        self._pending: Transition | None = None

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Start the streams of a run."""
        if not takes_churn(scheduler):
            churned = sorted(name for name, row in KNOWN.items() if row.churn)
            raise ValueError(
                f"{type(scheduler).__name__} cannot be churned: take one of {', '.join(churned)}, "
                "or a stochastic solver without churn"
            )
        self._pending = None
        self._streams = [
            torch.Generator().manual_seed(particle_seed(seed, _STREAM + slot))
            for seed in self.seeds(groups)
            for slot in slots
        ]

    def before(self, call: StepCall, x0: Tensor, progress: float) -> None:
        """Work out the ancestral step of this call."""
        here, there = level(call.scheduler, call.timestep), next_level(call.scheduler, call.timestep)
        self._pending = ancestral(call.sample, x0, here, there, self.eta)

    def after(self, call: StepCall, result: Any) -> Any:
        """Return the ancestral step's result in place of the solver's, once its stages are done."""
        if self._pending is None or not getattr(call.scheduler, "state_in_first_order", True):
            return result
        step, self._pending = self._pending, None
        noise = torch.stack([torch.randn(step.mean.shape[1:], generator=g) for g in self._streams])
        x = step.sample(noise=noise.to(step.mean))
        forget(call.scheduler)
        return replaced(result, x.to(stepped(result).dtype))


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta is in (0, 1]."""
    check_number("churn", eta)
    if not (math.isfinite(eta) and 0 < eta <= 1):
        raise ValueError(f"churn={eta}: give a number in (0, 1], or 0 for none")


class Twist(Proposal):
    """Shifts the steps of scored calls by the reward's gradient.

    gradient: from clean latents `[n, ...]` to grad r, same shape. strength: lambda. cap: the most that |s g|
    may be, in standard deviations of the step's noise summed over dimensions; without a cap the weights of
    high-dimensional states degenerate. spread: standard deviation of clean latents, for the slope
    J = alpha s^2 / (alpha^2 s^2 + sigma^2); 1 fits autoencoders. rising: scale g by the progress of the run,
    as the rising tilt does. Raises ValueError for cap or spread <= 0, and at the first scored call for
    solvers whose step is not a known Gaussian.
    """

    def __init__(
        self,
        gradient: Callable[[Tensor], Tensor],
        *,
        strength: float,
        cap: float,
        spread: float = 1.0,
        rising: bool = False,
    ) -> None:
        check_twist(cap, spread)
        self.gradient, self.strength = gradient, strength
        self.cap, self.spread, self.rising = cap, spread, rising
        self._pending: tuple[Transition, Tensor] | None = None
        self._ratio: Tensor | None = None

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Forget the last run."""
        self._pending = self._ratio = None

    def before(self, call: StepCall, x0: Tensor, progress: float) -> None:
        """Work out the step's Gaussian and its shift."""
        step = transition(call.scheduler, call.model_output, call.timestep, call.sample, **call.kwargs)
        if step.std == 0:
            return
        slope = self.strength * posterior_slope(next_level(call.scheduler, call.timestep), self.spread)
        g = slope * (progress if self.rising else 1.0) * self.gradient(x0).to(step.mean)
        size = step.std * g.flatten(1).norm(dim=1)
        shrink = (self.cap / size.clamp(min=1e-30)).clamp(max=1.0)
        self._pending = step, g * shrink.reshape(-1, *(1,) * (g.ndim - 1))

    def after(self, call: StepCall, result: Any) -> Any:
        """Return the shifted result, and keep the log ratio."""
        self._ratio = None
        if self._pending is None:
            return result
        (step, g), self._pending = self._pending, None
        x, s = stepped(result), step.std
        z = (x.to(step.mean) - step.mean) / s
        inner = (g * z).flatten(1).sum(1).double()
        self._ratio = -s * inner - 0.5 * s * s * g.flatten(1).double().square().sum(1)
        return replaced(result, (x.to(step.mean) + s * s * g).to(x.dtype))

    def log_ratio(self) -> Tensor | None:
        """Return log p/tau of the last step, `[n]` float64; None where it was not shifted."""
        return self._ratio


def posterior_slope(there: Level, spread: float) -> float:
    """Return d x0hat / d x at a level, for Gaussian clean data of standard deviation `spread`."""
    v = spread * spread
    return there.alpha * v / (there.alpha**2 * v + there.sigma**2)


def check_twist(cap: float, spread: float) -> None:
    """Raise ValueError unless cap and spread are above 0."""
    check_number("twist", cap)
    check_number("spread", spread)
    if not cap > 0:
        raise ValueError(f"twist={cap}: the cap must be above 0 (0 in a steerer switches twisting off)")
    if not (math.isfinite(spread) and spread > 0):
        raise ValueError(f"spread={spread}: it must be a finite number above 0")


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
                    "the reward has no gradient with respect to its images: twist needs a differentiable "
                    "reward that returns a tensor; set twist=0 for others"
                )
            slopes.append(torch.autograd.grad(rewards.sum(), part)[0])
    return torch.cat(slopes)
