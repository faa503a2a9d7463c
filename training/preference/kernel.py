"""The steps of a sampler as Gaussians whose mean is affine in x0hat: x_next ~ N(a x0hat + b x, s^2 I).

    kernel = Kernel.of(scheduler, path, eta=1.0)          # any scheduler that diffplug.transition knows
    x0 = kernel.predict(network, x, step, conditions)
    x_next = kernel.sample(x, x0, step, z)
    ell = kernel.log_ratio(x, x0, x0_ref, x_next, step)   # log p_theta - log p_ref, [n]

Steps count from 0, the noisiest. Different rows of one call may stand at different steps. A step is
*trainable* where it draws noise (s > 0) and is not nearly deterministic (omega = a^2 / 2 s^2 <= omega_max);
a deterministic step has no density and is refused. States are in the scheduler's own scale.
Formulas: arXiv 2410.03190 (PSO), 2010.02502 (DDIM), 2505.05470 (the noise of a flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from diffplug import noise
from diffplug.noise.gaussian_step import NormalForm, ancestral_form
from diffplug.noise.noise_level import Level
from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath, edges
from diffplug.transition import schedule_coefficients

__all__ = ["OMEGA_MAX", "Kernel", "Reduction"]

OMEGA_MAX = 1e4
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Kernel:
    """The steps of a schedule.

    path: of the model. index: [N] where the network is asked, on the path. scale: [N] the scheduler's states
    are so much larger than the path's. forms: a, b, s of every step. bound: what the scheduler does to x0hat
    (clipping), the same in roll-outs, for policy and for reference. start: the first states are so many times
    standard normal.
    """

    path: NoisePath
    index: Tensor
    scale: Tensor
    forms: tuple[NormalForm, ...]
    bound: Callable[[Tensor], Tensor] | None = None
    omega_max: float = OMEGA_MAX
    start: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, path: NoisePath, *, omega_max: float = OMEGA_MAX, **step: Any) -> Kernel:
        """Return the kernel of a scheduler whose timesteps are set. step: what its step takes, as eta.

        Raises ValueError for schedulers without a Gaussian step, and for multistep solvers.
        """
        forms = tuple(schedule_coefficients(scheduler, **step))
        if any(form.history for form in forms):
            raise ValueError(f"{type(scheduler).__name__} looks back at earlier steps: set solver_order=1")
        bound = noise.reading(scheduler, step_index=0).bound
        if bound is not None and any(form.slack for form in forms):
            raise ValueError(
                f"{type(scheduler).__name__} clips x0hat and not the direction: set clip_sample=False"
            )
        levels = noise.levels(scheduler)[:-1]
        start = float(getattr(scheduler, "init_noise_sigma", 1.0))  # flows begin at 1
        return cls(path, _indices(path, levels), _scales(path, levels), forms, bound, omega_max, start)

    @classmethod
    def ddim(cls, path: NoisePath, steps: int, eta: float = 1.0, omega_max: float = OMEGA_MAX) -> Kernel:
        """Return the ancestral step over `steps` equal segments of the path: DDIM with eta, flows included.

        The last step ends at a clean picture and is deterministic.
        """
        index, levels = _segments(path, steps)
        forms = tuple(ancestral_form(a, b, eta) for a, b in pairwise(levels))
        return cls(path, index[:-1], torch.ones(steps, dtype=torch.float64), forms, None, omega_max)

    @classmethod
    def renoise(
        cls,
        path: NoisePath,
        steps: int,
        omega_max: float = OMEGA_MAX,
        timesteps: Sequence[int] | None = None,
    ) -> Kernel:
        """Return the re-noising step over equal segments: x_next = alpha x0hat + sigma z (LCM, DMD2).

        timesteps: of a variance-preserving model, in place of the segments' ends.
        """
        index, levels = _segments(path, steps)
        if timesteps is not None:
            index, levels = _at(path, torch.tensor([*(t + 1 for t in timesteps), 0], dtype=torch.float64))
        forms = tuple(NormalForm(a=b.alpha, b=0.0, s=b.sigma) for b in levels[1:])
        return cls(path, index[:-1], torch.ones(steps, dtype=torch.float64), forms, None, omega_max)

    @classmethod
    def flow_sde(
        cls, path: NoisePath, steps: int, level: float = 0.7, omega_max: float = OMEGA_MAX
    ) -> Kernel:
        """Return Flow-GRPO's stochastic Euler step (arXiv 2505.05470, eq. 9) with noise `level`."""
        if not path.flow:
            raise ValueError("flow-sde is for flow models: take ddim with eta")
        index, levels = _segments(path, steps)
        sigmas = [point.sigma for point in levels]
        forms = tuple(_flow_sde(f, s, level, sigmas[1]) for f, s in pairwise(sigmas))
        return cls(path, index[:-1], torch.ones(steps, dtype=torch.float64), forms, None, omega_max)

    def __len__(self) -> int:
        return len(self.forms)

    def stochastic(self, step: int) -> bool:
        """Whether a step has a density that can be trained."""
        form = self.forms[step]
        return form.s > 0 and form.kl_weight <= self.omega_max

    @property
    def trainable(self) -> list[int]:
        """The steps that have a density."""
        return [i for i in range(len(self)) if self.stochastic(i)]

    def omega(self, step: Tensor) -> Tensor:
        """Return a^2 / 2 s^2 of steps [n]: the KL per squared difference of x0hat, float64."""
        return torch.tensor([form.kl_weight for form in self.forms], dtype=torch.float64)[step.cpu()]

    def predict(
        self,
        network: Network,
        x: Tensor,
        step: Tensor,
        conditions: Conditions,
        *,
        original: bool = False,
        guidance: float = 1.0,
    ) -> Tensor:
        """Return x0hat of states x [n, ...] at steps [n]; `original`: of the reference, without gradients.

        guidance: classifier-free, combined before x0hat, at two rows a state; needs the network's `null`.
        """
        step, ask = step.cpu(), network.original if original else network
        told, index = x / _like(self.scale[step], x), self.index[step]
        if guidance == 1:
            x0 = ask(told, index, conditions).x0
        else:
            assert network.null is not None, "guidance needs the empty prompt"  # noqa: S101 - of our own calls
            free = network.null.to(x.device, x.dtype).expand(len(x))
            both = Conditions.cat([free, conditions.to(x.device, x.dtype)])
            free_x0, told_x0 = ask(told.repeat(2, *(1,) * (x.ndim - 1)), index.repeat(2), both).x0.chunk(2)
            x0 = free_x0 + guidance * (told_x0 - free_x0)
        return x0 if self.bound is None else self.bound(x0)

    def mean(self, x: Tensor, x0: Tensor, step: Tensor) -> Tensor:
        """Return the mean of the next state."""
        a, b, _ = self._numbers(step, x)
        return a * x0 + b * x

    def sample(self, x: Tensor, x0: Tensor, step: Tensor, z: Tensor) -> Tensor:
        """Return the next state with standard normal z."""
        a, b, s = self._numbers(step, x)
        return a * x0 + b * x + s * z

    def log_prob(
        self, x: Tensor, x0: Tensor, x_next: Tensor, step: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the log density of x_next [n], float64; "mean" over dimensions is the field's convention."""
        s = self._density(step)
        gap = (x_next.double() - self.mean(x.double(), x0.double(), step)).square()
        s_like = _like(s, gap)
        values = -gap / (2 * s_like**2) - s_like.log() - 0.5 * math.log(2 * math.pi)
        return _reduced(values, reduction)

    def log_ratio(
        self,
        x: Tensor,
        x0: Tensor,
        x0_ref: Tensor,
        x_next: Tensor,
        step: Tensor,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return log p(x_next) with x0 less that with x0_ref, [n] float64; exactly 0 for equal predictions.

        Written as a (x0 - x0_ref) (2 x_next - mean - mean_ref) / 2 s^2, which loses no digits.
        """
        self._density(step)
        a, _, s = self._numbers(step, x.double())
        means = self.mean(x.double(), x0.double(), step) + self.mean(x.double(), x0_ref.double(), step)
        moved = a * (x0.double() - x0_ref.double())
        return _reduced(moved * (2 * x_next.double() - means) / (2 * s**2), reduction)

    def kl(self, x0: Tensor, x0_ref: Tensor, step: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return KL(theta || reference) of a step, omega (x0 - x0_ref)^2, [n] float64."""
        self._density(step)
        gap = (x0.double() - x0_ref.double()).square()
        return _reduced(_like(self.omega(step), gap) * gap, reduction)

    def _numbers(self, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.forms[i] for i in step.tolist()]
        a, b, s = (torch.tensor([getattr(f, n) for f in rows], dtype=torch.float64) for n in ("a", "b", "s"))
        return _like(a, x), _like(b, x), _like(s, x)

    def _density(self, step: Tensor) -> Tensor:
        bad = [i for i in step.tolist() if self.forms[i].s == 0]
        if bad:
            raise ValueError(
                f"step {bad[0]} of {len(self)} is deterministic, it has no density: leave it out "
                "(Kernel.trainable), or draw with noise (eta > 0)"
            )
        return torch.tensor([self.forms[i].s for i in step.tolist()], dtype=torch.float64)


def _segments(path: NoisePath, steps: int) -> tuple[Tensor, list[Level]]:
    return _at(path, torch.tensor(edges(path, steps)[::-1], dtype=torch.float64))


def _at(path: NoisePath, index: Tensor) -> tuple[Tensor, list[Level]]:
    alpha, sigma = path.levels(index)
    return index, [Level(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]


def _indices(path: NoisePath, levels: list[Level]) -> Tensor:
    return torch.tensor([path.index_of(at.alpha, at.sigma) for at in levels], dtype=torch.float64)


def _scales(path: NoisePath, levels: list[Level]) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([1 / path.standard(one, at.alpha, at.sigma) for at in levels])


def _flow_sde(here: float, there: float, level: float, second: float) -> NormalForm:
    """Return the step from sigma `here` to `there`; at sigma 1 the noise is that of the `second` sigma."""
    dt = there - here
    g2 = level**2 * here / (1 - (second if here == 1 else here))
    drift, toward = 1 + g2 * dt / (2 * here), (1 + g2 * (1 - here) / (2 * here)) * dt
    # mean = drift x + toward v with v = (x - x0) / here
    return NormalForm(a=-toward / here, b=drift + toward / here, s=math.sqrt(g2 * -dt))


def _like(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is unknown: take 'mean' or 'sum'")
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)
