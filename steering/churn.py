"""Churn: noise for solvers that add none, at the scored calls, so that copied particles part.

At a scored call the solver's own step is replaced by the universal ancestral step (`diffplug.transition`)

    x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps_hat + tau z,    tau^2 = eta^2 sigma_s^2 (1 - e^-2h)

and the solver stays deterministic elsewhere. Every particle is churned at a scored call, moved or not: so the
chain that is steered is one fixed chain, its weights stay exact, and no group depends on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall
from diffplug.noise import level, next_level
from diffplug.noise_level import base_name
from diffplug.seeds import particle_seed
from diffplug.steering.options import check_number
from diffplug.steering.proposal import Proposal, replaced, stepped
from diffplug.transition import Transition, ancestral

_ONE_STEP = (
    "DDIM EulerDiscrete FlowMatchEulerDiscrete EDMEuler DPMSolverMultistep EDMDPMSolverMultistep "
    "DEISMultistep IPNDM UniPCMultistep SASolver"
)
_TWO_STAGES = "HeunDiscrete FlowMatchHeunDiscrete"
CHURNED = frozenset(f"{name}Scheduler" for name in (_ONE_STEP + " " + _TWO_STAGES).split())
_STREAM = 1 << 20  # of the particles' churn, away from the streams of the selections


def takes_churn(scheduler: Any) -> bool:
    """Return whether noise between the steps of this solver stays and does it no harm."""
    return base_name(scheduler, CHURNED) != ""


class Churn(Proposal):
    """Makes the steps of scored calls ancestral with strength eta.

    eta: 1 gives the noise of ancestral sampling, less keeps more of the solver's direction. seeds: from the
    number of prompts to one seed for each; every particle has its own stream. Solvers with a
    corrector (UniPC, SA-Solver) forget the sample they would correct from, which would take about half of the
    noise out again; Heun is churned after its second stage. Raises ValueError for eta outside (0, 1] and for
    solvers not in `CHURNED`, where noise in between is undone or breaks their groups of steps.
    """

    def __init__(self, eta: float, seeds: Callable[[int], Sequence[int]]) -> None:
        check_eta(eta)
        self.eta, self.seeds = eta, seeds
        self._streams: list[torch.Generator] = []
        self._pending: Transition | None = None

    def begin(self, scheduler: Any, groups: int, slots: range) -> None:
        """Start the streams of a run."""
        if not takes_churn(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} cannot be churned: take one of {', '.join(sorted(CHURNED))}, "
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


def forget(scheduler: Any) -> None:
    """Make a solver forget what fresh noise has made untrue.

    A corrector re-derives the state from the sample of the last call, without the noise. Solvers that
    extrapolate noise predictions take the fresh noise for a slope: on N(1, .25) DEIS of order 2 ended with
    variance .209, of order 3 with .319, where first-order steps after noise give .173. Those that extrapolate
    clean predictions keep their history, which serves them well. A scheduler with a method
    `forget_history()` sees to it itself.
    """
    own = getattr(scheduler, "forget_history", None)
    if callable(own):
        own()
        return
    if getattr(scheduler, "last_sample", None) is not None:
        scheduler.last_sample = None
    if base_name(scheduler, _REMEMBERS_NOISE):
        scheduler.ets = []
    elif _predicts_noise(scheduler.config) and hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0


def _predicts_noise(config: Any) -> bool:
    """Return whether a solver extrapolates the network's noise, not its clean predictions."""
    return config.get("algorithm_type") in _NOISE_TYPES or config.get("predict_x0") is False


_NOISE_TYPES = ("deis", "dpmsolver", "sde-dpmsolver", "noise_prediction")
_REMEMBERS_NOISE = frozenset({"IPNDMScheduler"})


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta is in (0, 1]."""
    check_number("churn", eta)
    if not (math.isfinite(eta) and 0 < eta <= 1):
        raise ValueError(f"churn={eta}: give a number in (0, 1], or 0 for none")
