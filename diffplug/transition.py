"""The Gaussian step of a stochastic scheduler as a value: mean, std, and sample, log_prob, kl from them.

    step = transition(scheduler, output, t, latents, eta=1.0)
    latents_next = step.sample(generator)          # what scheduler.step would return, in float32
    logp = step.log_prob(latents_next)             # [n] float64, mean over dimensions

Every step here has the normal form mean = a x0hat + b x with noise s: ``coefficients`` gives these three
numbers for any step of a schedule without a network output, ``transition`` puts them to work, and
``ancestral`` makes the universal stochastic step between any two levels. Nothing here mutates a scheduler;
numbers are float64 on the host.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffplug.noise.families import Level, Reading, position, reading, step_count, step_kernel
from diffplug.noise.gaussian_step import NormalForm, ancestral_form
from diffplug.noise.prediction import wide

__all__ = ["NormalForm", "Transition", "ancestral", "coefficients", "schedule_coefficients", "transition"]

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Transition:
    """One step x_next ~ N(mean, std^2 I), one Gaussian per sample of the batch.

    mean: [n, ...] float32 or wider. std: one number for all values, 0 for a deterministic step.
    x0: the clean prediction that the step was made from, shaped like ``mean``.
    form: the numbers a, b, s behind it, None when it was put together by hand.
    """

    mean: Tensor
    std: float
    x0: Tensor
    form: NormalForm | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std is {self.std}, allowed is a finite number >= 0")

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return mean + std * noise, shaped and typed like ``mean``; a deterministic step returns its mean.

        generator: one for the batch or one per sample, as in Diffusers. noise: standard normal values to use
        instead.
        """
        if self.std == 0:
            return self.mean
        if noise is None:
            noise = _normal(self.mean, generator)
        elif noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the step needs {tuple(self.mean.shape)}")
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the log density of ``x`` under this step, [n] float64; differentiable in ``x`` and ``mean``.

        reduction: "sum" over the dimensions of a sample is the true density; "mean" is that divided by their
        number, the convention of published policy-gradient and preference trainers (PSO, DDPO, SPO,
        Flow-GRPO).
        Raises ValueError for a deterministic step.
        """
        s = self._noise()
        gap = (_double(x) - _double(self.mean)).square() / (2 * s * s)
        return _reduce(-gap - math.log(s) - 0.5 * math.log(2 * math.pi), reduction)

    def kl(self, other: Transition, reduction: Reduction = "mean") -> Tensor:
        """Return KL(self || other) per sample, [n] float64, in closed form; ``reduction`` as in ``log_prob``.

        Raises ValueError where one of the two steps is deterministic.
        """
        s, r = self._noise(), other._noise()
        gap = (_double(self.mean) - _double(other.mean)).square() / (2 * r * r)
        return _reduce(gap + (math.log(r / s) + s * s / (2 * r * r) - 0.5), reduction)

    def _noise(self) -> float:
        if self.std == 0:
            advice = self.form.advice if self.form is not None and self.form.advice else "eta > 0"
            raise ValueError(
                f"this step is deterministic (std = 0), it has no density: for a stochastic one use {advice}"
            )
        return self.std


def transition(
    scheduler: Any,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    *,
    step_index: int | None = None,
    **step_kwargs: Any,
) -> Transition:
    """Return the step that ``scheduler.step(output, timestep, sample, ...)`` would take, as a Transition.

    Costs a few multiply-adds; the scheduler is not mutated. With the same standard normal noise, ``sample``
    equals the scheduler's prev_sample (in float32, before the cast to the network's dtype).
    output, timestep, sample, step_index: as in ``diffplug.noise.x0hat``. step_kwargs: those that shape the
    step (DDIM: eta, use_clipped_model_output; TCD: eta, 0.3 by default); generator, variance_noise and
    return_dict are passed over. Second-order DPM-Solver steps use the history that the scheduler holds.
    Raises ValueError for schedulers without a Gaussian step, learned variances, and arguments that it cannot
    honour.
    """
    form = coefficients(scheduler, timestep, step_index=step_index, **step_kwargs)
    now = reading(scheduler, timestep, step_index=step_index)
    raw = now.raw(output, sample)
    x0 = now.clip(raw)
    return Transition(
        _mean(form, now, raw, x0, wide(sample), _history(scheduler, form, step_index)), form.s, x0, form
    )


def _mean(
    form: NormalForm, now: Reading, raw: Tensor, x0: Tensor, x: Tensor, history: list[Tensor]
) -> Tensor:
    mean = form.a * x0
    if form.b != 0:
        mean = mean + form.b * x
    if form.slack != 0 and now.bound is not None:
        mean = mean + form.slack * (x0 - raw)
    for weight, earlier in zip(form.history, history, strict=True):
        mean = mean + weight * earlier
    return mean


def _history(scheduler: Any, form: NormalForm, index: int | None) -> list[Tensor]:
    """Return the earlier clean predictions that the step needs, latest first, from the scheduler's store."""
    n = len(form.history)
    if n and index is not None and index != scheduler.step_index:
        raise ValueError(
            f"step {index} needs earlier predictions, the scheduler stands at step {scheduler.step_index}: "
            "ask for the running step, or set solver_order=1"
        )
    return [scheduler.model_outputs[-1 - j] for j in range(n)]


def coefficients(
    scheduler: Any, timestep: Any = None, *, step_index: int | None = None, **step_kwargs: Any
) -> NormalForm:
    """Return a, b, s of the step at ``timestep`` (or at ``step_index``), from the scheduler's tables alone.

    mean = a x0hat + b x, std = s, so that a difference in x0hat moves the mean by a times as much, and the KL
    between two networks is ``kl_weight`` times the mean squared difference of their x0hat. Arguments and
    errors as in ``transition``.
    """
    step = step_kernel(scheduler)
    at = position(scheduler, timestep, step_index)
    return step(scheduler, at, **_kernel_kwargs(scheduler, step, step_kwargs))


def schedule_coefficients(scheduler: Any, **step_kwargs: Any) -> list[NormalForm]:
    """Return the ``coefficients`` of every step of the schedule that is set, first to last."""
    return [coefficients(scheduler, step_index=i, **step_kwargs) for i in range(step_count(scheduler))]


_PASSED_OVER = ("generator", "variance_noise", "return_dict")


def _kernel_kwargs(scheduler: Any, step: Any, step_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments the kernel understands; ValueError for others, unless they are step's defaults."""
    known = inspect.signature(step).parameters
    if not step_kwargs.keys() - known.keys():
        return step_kwargs
    defaults = {k: p.default for k, p in inspect.signature(scheduler.step).parameters.items()}
    for key in step_kwargs.keys() - known.keys() - set(_PASSED_OVER):
        given = step_kwargs[key]
        if key not in defaults or isinstance(given, Tensor) or given != defaults[key]:
            allowed = [k for k in known if k not in ("scheduler", "at")] + list(_PASSED_OVER)
            raise ValueError(
                f"{key}={step_kwargs[key]!r} cannot be part of a {type(scheduler).__name__} transition: "
                f"allowed are {', '.join(allowed)}"
            )
    return {k: v for k, v in step_kwargs.items() if k in known}


def ancestral(x: Tensor, x0: Tensor, here: Level, there: Level, eta: float = 1.0) -> Transition:
    """Return the universal ancestral step from ``x`` at level ``here`` to ``there``; two multiply-adds.

    x_next = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps_hat + tau z with tau^2 = eta^2 sigma_s^2 (1 - e^-2h) and
    e^-h = alpha_t sigma_s / (alpha_s sigma_t). Any conventions of ``x``: in its own it equals DDIM with eta
    (arXiv 2010.02502), Euler ancestral and first-order SDE-DPM-Solver++ (eta 1), and eta 0 is the
    deterministic step. Well defined from pure noise (alpha 0) and to a clean end (sigma 0).
    x, x0: [n, ...] state and clean prediction. Raises ValueError when ``there`` is noisier than ``here``,
    when ``here`` is clean, and when eta asks for more noise than there is.
    """
    if x.shape != x0.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and x0 {tuple(x0.shape)}: they must be equal")
    form = ancestral_form(here, there, eta)
    clean = wide(x0)
    return Transition(form.a * clean + form.b * wide(x), form.s, clean, form)


def _normal(like: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    given = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(like.shape, generator=given, device=like.device, dtype=like.dtype)


def _double(x: Tensor) -> Tensor:
    return wide(x) if x.device.type == "mps" else x.double()  # MPS has no float64


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is unknown: allowed are 'mean' and 'sum'")
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    return flat.mean(1) if reduction == "mean" else flat.sum(1)
