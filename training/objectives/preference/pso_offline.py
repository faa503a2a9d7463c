"""PSO from pairs of pictures (arXiv 2410.03190, offline): no roll-out, no reward, no stochastic sampler.

    l = omega_n mean( |x0 - x0hat_ref|^2 - |x0 - x0hat|^2 ),   L = -log sigmoid(beta [l(w) - l(l)])

Better and worse picture are carried forward to one timestep of the student's own grid by the same noise. l is
the expected log-ratio of the re-noising step that would lead to the picture: the expectation over that step's
noise is taken in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.data import DataSettings
from diffplug.training.network import Network
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.kernels import SchedulerSampling, scheduler_of
from diffplug.training.preference.pair_loss import pair_loss
from diffplug.training.preference.pairs import Pair, PairLatents, read_pairs
from diffplug.training.preference.start import policy
from diffplug.training.student import Sampling
from diffplug.training.tuner import Tuner

__all__ = ["OfflinePSO", "OfflineSettings"]


@dataclass(frozen=True, kw_only=True)
class OfflineSettings:
    """The table [objective] of `pso-offline`.

    pairs: a folder, .jsonl or .parquet of (prompt, better, worse), or votes. scheduler: class of Diffusers
    that the model is drawn with (EulerAncestralDiscreteScheduler for SDXL-Turbo), None for DDIM, or Euler
    for flows; timesteps: of it, None for trailing ones. beta: of the preference. anchor: weight of the
    squared difference to the start model's x0hat at the last step, None for 0.2 beta.
    """

    pairs: str = ""
    scheduler: str | None = None
    timesteps: tuple[int, ...] | None = None
    beta: float = 10.0
    anchor: float | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if (self.anchor or 0) < 0:
            raise ValueError(f"anchor must be at least 0, got {self.anchor}")


class OfflinePSO(Objective):
    """Trains `network` on pairs at the noise levels of `kernel`."""

    Settings: type = OfflineSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"batch": 32, "updates": 200},
        "optimizer": {"lr": 2e-5, "warmup": 5, "betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "teacher": {"guidance": 1.0},
    }

    def __init__(self, network: Network, kernel: Kernel, data: PairLatents, settings: Any) -> None:
        self.network, self.kernel, self.data, self.settings = network, kernel, data, settings

    @classmethod
    def from_job(cls, job: Any) -> OfflinePSO:
        """Return the objective of `diffplug train`."""
        data = PairLatents.of(
            job.pipe,
            _pairs(job),
            job.cache / "latents",
            size=job.config.data.size,
            call=job.call,
        )
        steps = job.config.student.steps
        kernel = Kernel.renoise(job.path, steps, timesteps=job.objective.timesteps)
        return cls(job.network, kernel, data, job.objective)

    @staticmethod
    def sampling(job: Any) -> Sampling:
        """Return how the tuned model is drawn with."""
        told, student = job.objective, job.config.student
        way: dict[str, Any] = {"eta": student.eta, "guidance": student.guidance}
        if told.scheduler is None:
            return Sampling(job.path, (student.steps,), **way)
        named = {"named": told.scheduler, "timesteps": told.timesteps}
        return SchedulerSampling(job.path, (student.steps,), **way, **named)

    @staticmethod
    def tuner_of(job: Any) -> Tuner:
        """Return the policy, on top of the student that it begins from."""
        return policy(job)

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for pairs that are not there, before any work."""
        _pairs(job)
        objective, steps = job.objective, job.config.student.steps
        if objective.scheduler is not None:
            scheduler_of(objective.scheduler, job.pipe.scheduler.config, job.path, steps, objective.timesteps)
        elif objective.timesteps is not None:
            raise ValueError("objective.timesteps would do nothing without objective.scheduler: name it too")
        told = job.config.data.prompts
        if told != DataSettings().prompts:
            raise ValueError(
                f"data.prompts={told!r} would do nothing: prompts are in the pairs (validation.prompts is "
                "for sheets)"
            )

    @staticmethod
    def prompts(job: Any) -> list[str]:
        """Return the prompts of the pairs, of which sheets are drawn."""
        return list(dict.fromkeys(pair.prompt for pair in _pairs(job)))

    def groups(self) -> list[Group]:
        """The policy."""
        return [Group("student", self.network.weights)]

    def levels(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the index of each row's noise level [n], and its weight omega; the last step weighs as the
        one before."""
        steps = len(self.kernel)
        at = (torch.tensor(list(rows.rows)) + rows.update) % steps
        dense = self.kernel.trainable
        weight = (
            self.kernel.omega(at.clamp(max=dense[-1])) if dense else torch.ones(len(at), dtype=torch.float64)
        )
        return self.kernel.index[at], weight

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of a pair for each row."""
        item = rows.items(len(self.data))
        clean = self.data.latents[item].to(rows.device).transpose(0, 1).flatten(0, 1)  # better, then worse
        conditions = self.data.conditions[item].to(rows.device)
        index, omega = self.levels(rows)
        noise = rows.normal(*clean.shape[1:]).repeat(2, *(1,) * (clean.ndim - 1))
        both, twice = Conditions.cat([conditions, conditions]), index.repeat(2)
        x = self.network.path.noised(clean, noise, torch.zeros_like(twice), twice)
        x0, ref = self.network(x, twice, both).x0, self.network.original(x, twice, both).x0
        gain = _mean((clean - ref).double().square() - (clean - x0).double().square())
        ell = omega.to(rows.device).repeat(2) * gain
        winner, loser = ell.chunk(2)
        loss = pair_loss(winner[:, None], loser[:, None], beta=self.settings.beta)
        gap = _mean((x0 - ref).square()).view(2, -1).mean(0)
        held = self.settings.beta * 0.2 if self.settings.anchor is None else self.settings.anchor
        last = (index == self.kernel.index[-1]).to(gap.device)
        log = {**loss.log, "anchor": gap.detach().mean()}
        return Loss(loss.errors + held * gap * last, log=log, timesteps=self.network.path.timesteps(index))

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Nothing but the tuner's."""
        self.network.tuner.updated(update)


def _pairs(job: Any) -> list[Pair]:
    """Return a job's pairs, read once."""
    if "pairs" not in vars(job):
        vars(job)["pairs"] = read_pairs(job.objective.pairs)
    found: list[Pair] = vars(job)["pairs"]
    return found


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
