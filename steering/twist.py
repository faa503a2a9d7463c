"""Gradient-twisted proposals: the noise of a scored step leans towards what the reward likes.

The mean of the solver's Gaussian step N(m, s^2) moves by s^2 g with g = strength * J * grad_x0 r, where J is
the slope of the clean prediction at the next level. The weights get the exact log ratio

    log p / tau = -s <g, z> - s^2 |g|^2 / 2          z: the noise that the solver drew

so the filter is exact for every g (twisted diffusion sampler, arXiv 2306.17775). Only the decoder and the
reward are differentiated, never the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall
from diffplug.noise import Level, next_level
from diffplug.steering.options import check_number
from diffplug.steering.proposal import Proposal, replaced, stepped
from diffplug.transition import Transition, transition


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
