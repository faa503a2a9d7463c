"""The noise levels that a model was trained with: from a stored sigma to (alpha, sigma), lambda and time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffplug.noise.noise_level import Level

Floats = npt.NDArray[np.float64]
TINIEST_ALPHA = 2.0**-24  # 1 - sigma of a flow model for the float32 sigma just below 1


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """Noise as Diffusers' solvers store it: sigma / alpha for VP models, sigma in (0, 1] for flow models.

    table: sigma / alpha [T] of every training timestep, increasing; None for flow models.
    train_steps: T, the time of pure noise. shift: S of a flow model: time t has sigma
    S t / (T + (S - 1) t). terminal: the sigma at which a flow model's runs take their last step
    (shift_terminal), None where that is the smallest of training.
    """

    table: FloatArray | None
    train_steps: int = 1000
    shift: float = 1.0
    terminal: float | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any, mu: float | None = None) -> NoiseLevels:
        """The levels of a scheduler with UniPC's configuration; mu: strength of its dynamic shifting."""
        config = scheduler.config
        steps = int(config.num_train_timesteps)
        if not config.use_flow_sigmas:
            cumprod = scheduler.alphas_cumprod.cpu()
            return cls((((1 - cumprod) / cumprod) ** 0.5).numpy(), steps)
        terminal = config.shift_terminal or None
        if not config.use_dynamic_shifting:
            return cls(None, steps, float(config.flow_shift), terminal)
        strength = 1.0 if mu is None else mu
        shift = math.exp(strength) if config.time_shift_type == "exponential" else strength
        return cls(None, steps, shift, terminal)

    @property
    def flow(self) -> bool:
        """Whether x = (1 - s) x0 + s eps, instead of alpha^2 + sigma^2 = 1."""
        return self.table is None

    @property
    def sigma_min(self) -> float:
        """The smallest stored sigma of training (flow: of the time 1)."""
        return float(self.sigma_of_time(np.array([1.0 if self.flow else 0.0]))[0])

    @property
    def sigma_max(self) -> float:
        """The largest stored sigma of training (flow: 1)."""
        return 1.0 if self.table is None else float(self.table[-1])

    @property
    def last(self) -> float:
        """The smallest stored sigma of a run: the terminal one where there is one, else that of training."""
        return self.sigma_min if self.terminal is None else self.terminal

    def level(self, sigma: float) -> Level:
        """(alpha, sigma) at a stored sigma >= 0; flow models keep a tiny alpha, so that its log exists."""
        if self.flow:
            return Level(max(1.0 - sigma, TINIEST_ALPHA), sigma)
        alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
        return Level(alpha, sigma * alpha)

    def sigma_of_time(self, times: Any) -> Floats:
        """Stored sigmas at (fractional) timesteps: VP linear in the table, flow t / T, then shifted."""
        times = np.asarray(times, dtype=np.float64)
        if self.table is not None:
            return np.asarray(vp_sigmas(times, self.table), dtype=np.float64)
        return self.shifted(times / self.train_steps)

    def shifted(self, sigmas: Floats) -> Floats:
        """S s / (1 + (S - 1) s): what a flow model's shift makes of plain sigmas."""
        return sigmas if self.shift == 1 else self.shift * sigmas / (1.0 + (self.shift - 1.0) * sigmas)

    def stretched(self, sigmas: Floats) -> Floats:
        """Decreasing sigmas, their distances from 1 stretched: the last one above 0 becomes the terminal."""
        lowest = sigmas[sigmas > 0].min()
        if self.terminal is None or lowest == 1:
            return sigmas
        scale = (1.0 - self.terminal) / (1.0 - lowest)
        return np.where(sigmas > 0, 1.0 - scale * (1.0 - sigmas), 0.0)

    def time_of_sigma(self, sigmas: Any) -> Floats:
        """What the network is told at stored sigmas > 0: VP by the table (log-linear), flow T sigma."""
        sigmas = np.asarray(sigmas, dtype=np.float64)
        if self.table is None:
            return sigmas * self.train_steps
        return np.asarray(vp_timesteps(sigmas, self.table), dtype=np.float64)

    def sigma_of_lambda(self, lambdas: Any) -> Floats:
        """Stored sigmas at lambda = log alpha - log sigma; infinity gives 0."""
        lambdas = np.asarray(lambdas, dtype=np.float64)
        ratio = np.exp(-lambdas)
        return ratio / (1.0 + ratio) if self.flow else ratio


FloatArray = npt.NDArray[np.floating[Any]]


SNAP = 1e-3  # a timestep this close to a whole number was meant to be that number


def vp_sigmas(timesteps: FloatArray, table: FloatArray) -> FloatArray:
    """sigma / alpha at (fractional) timesteps, linear in the training table [T] of sigma / alpha."""
    return np.interp(timesteps, np.arange(len(table)), table)


def vp_timesteps(sigmas: FloatArray, table: FloatArray) -> FloatArray:
    """Fractional timesteps of sigma / alpha, linear in log sigma; clamped to the training range."""
    timesteps = np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
    whole = np.round(timesteps)
    return np.where(np.abs(timesteps - whole) < SNAP, whole, timesteps)
