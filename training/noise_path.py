"""Signal and noise of a model at its training indices, and the jump between two of them.

Index i runs from 0, a clean sample, to T, where sampling begins; x_i = alpha_i x0 + sigma_i eps. A
variance-preserving model is told the timestep i - 1 at index i. A flow model has u = i / T, the shifted
sigma s u / (1 + (s - 1) u), and is told T sigma. The edges of k equal segments are the indices j T / k: for
variance-preserving models the timesteps that DDIM with trailing spacing visits in k steps, and for flow
models the sigmas of k equal steps before the shift (arXiv 2404.13686, 2405.18407).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug import noise
from diffplug.noise.prediction import PREDICTIONS

__all__ = ["NoisePath", "Prediction", "edges"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of a state: the clean sample and the noise, [n, ...] each."""

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True, eq=False)
class NoisePath:
    """The levels of a model. abar: cumulative products [T] of a variance-preserving model, None for flows.

    prediction: "epsilon", "v_prediction", "sample" or "flow_prediction". shift: of a flow model.
    """

    abar: Tensor | None
    prediction: str
    train_steps: int = 1000
    shift: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, shift: float | None = None) -> NoisePath:
        """Return the path of the model that a scheduler belongs to; `shift` overrides a flow's own."""
        config = scheduler.config
        steps = int(config.num_train_timesteps)
        if noise.family(scheduler) is noise.FLOW or config.get("use_flow_sigmas", False):
            own = config.get("shift", config.get("flow_shift", 1.0))
            return cls(None, "flow_prediction", steps, float(own if shift is None else shift))
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {kind!r} is no noise schedule that can be "
                "trained on: give the pipeline DDIM or flow-matching Euler"
            )
        return cls(scheduler.alphas_cumprod.detach().double().cpu(), kind, steps)

    @property
    def flow(self) -> bool:
        """Whether x = (1 - sigma) x0 + sigma eps."""
        return self.abar is None

    def levels(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at indices [n], float64 on the CPU. Whole indices, for flows any number."""
        if self.abar is None:
            u = index.double().cpu() / self.train_steps
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            return 1 - sigma, sigma
        signal = torch.cat([self.abar.new_ones(1), self.abar])[index.long().cpu()]
        return signal.sqrt(), (1 - signal).sqrt()

    def timesteps(self, index: Tensor) -> Tensor:
        """Return what the scheduler's `step` is told at indices [n], float64 on the CPU."""
        return index.double().cpu() - 1 if self.abar is not None else self.levels(index)[1] * self.train_steps

    def index_of(self, alpha: float, sigma: float) -> float:
        """Return the index of a level in any scale of x; ValueError where a model was not trained there."""
        if self.abar is None:
            s = sigma / (alpha + sigma)
            return self.train_steps * s / (self.shift - (self.shift - 1) * s)
        signal = torch.cat([self.abar.new_ones(1), self.abar])
        wanted = 1 / (1 + (sigma / alpha) ** 2) if alpha else 0.0
        found = int((signal - wanted).abs().argmin())
        gap = signal[max(found - 1, 0) : found + 2].diff().abs().min()
        if abs(float(signal[found]) - wanted) > 0.1 * float(gap):
            raise ValueError(
                f"a sampler went to alpha {alpha:.4g}, sigma {sigma:.4g}, between the timesteps of training: "
                "take ddim or dpm++ as the teacher's sampler"
            )
        return float(found)

    def predict(self, output: Tensor, x: Tensor, index: Tensor) -> Prediction:
        """Return x0 and eps from a network output at states x [n, ...]; differentiable."""
        alpha, sigma = (_as(value, x) for value in self.levels(index))
        if self.prediction == "epsilon":
            return Prediction((x - sigma * output) / alpha, output)
        if self.prediction == "v_prediction":
            return Prediction(alpha * x - sigma * output, alpha * output + sigma * x)
        if self.prediction == "flow_prediction":
            return Prediction(x - sigma * output, x + alpha * output)
        return Prediction(output, (x - alpha * output) / sigma)

    def jump(self, said: Prediction, index: Tensor) -> Tensor:
        """Return the state at `index` with x0 and eps held: a step of DDIM, or of Euler for flows."""
        alpha, sigma = (_as(value, said.x0) for value in self.levels(index))
        return alpha * said.x0 + sigma * said.eps

    def noised(self, x: Tensor, eps: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Return states of index `start` carried up to the noisier index `end` by fresh noise."""
        (a, s), (b, t) = self.levels(start), self.levels(end)
        ratio = b / a
        return _as(ratio, x) * x + _as((t**2 - (ratio * s) ** 2).clamp(min=0).sqrt(), x) * eps

    def standard(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return a scheduler's sample at (alpha, sigma) in this model's scale (Euler's states are larger)."""
        return x / ((alpha + sigma) if self.flow else (alpha**2 + sigma**2) ** 0.5)


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(-1, *(1,) * (like.ndim - 1))


def edges(path: NoisePath, segments: int) -> list[int]:
    """Return the indices 0, T / k, ..., T of k segments; ValueError where T does not divide."""
    if segments < 1 or path.train_steps % segments:
        near = [k for k in range(1, 65) if path.train_steps % k == 0]
        raise ValueError(
            f"{segments} steps do not divide the {path.train_steps} timesteps of the model: take one of "
            f"{', '.join(map(str, near))}"
        )
    return [j * path.train_steps // segments for j in range(segments + 1)]
