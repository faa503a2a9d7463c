"""Trajectory distribution matching (TDM, arXiv 2503.06674): what the student draws at each of its steps is
distributed as the teacher's states are. No pictures, no discriminator, no stored trajectory.

An update trains one step of the student, e -> e'. The student is rolled out to e without gradients; there

    x0, eps   = student(x_e)                          with a graph
    x_tau     = the student's state at e', carried up to tau in (e', e) by fresh noise
    d         = x0_real(x_tau) - x0_fake(x_tau)       the distributions' difference, unguided (DM)
    c         = (g - 1) (x0_real - x0_null)           what guidance adds (CA, arXiv 2511.22677)
    L_student = Huber(x0 - sg(x0 + d + c)) / mean |x0 - x0_real,g|
    L_fake    = w min(SNR_tau, 5) |x0_fake(x_tau) - sg(x0)|^2

real is the teacher; fake is a second set of the student's weights that learns to denoise what the student
draws, in the same update. w corrects for the noise that the student's own eps puts into x_tau.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.noise_path import Prediction, edges
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.trajectories import Trajectories

__all__ = ["DistributionSettings", "Terms", "TrajectoryDistribution", "dmd_loss", "tdm_loss", "terms"]


@dataclass(frozen=True, kw_only=True)
class DistributionSettings:
    """The table [objective] of `tdm` and `one-step`.

    guidance: g. fake_lr: factor of the fake's learning rate over the student's. warmup: updates in which the
    fake learns alone. dm: "step" draws tau within the student's step, "full" draws the unguided term's over
    all noise levels. anchor: weight of the squared error to the teacher's stored states, on `anchor_share` of
    the rows, 0 for none. margin: indices that tau keeps from the upper edge; lowest: the smallest tau.
    """

    guidance: float = 5.0
    fake_lr: float = 3.0
    warmup: int = 20
    dm: Literal["step", "full"] = "step"
    anchor: float = 0.0
    anchor_share: float = 0.5
    margin: int = 10
    lowest: int = 20

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1 (no guidance), got {self.guidance}")
        if self.fake_lr <= 0:
            raise ValueError(f"fake_lr must be above 0, got {self.fake_lr}")
        if self.anchor < 0 or not 0 <= self.anchor_share <= 1:
            raise ValueError(
                f"anchor must be at least 0, and anchor_share from 0 to 1, got {self.anchor}, "
                f"{self.anchor_share}"
            )
        if not self.anchor and self.anchor_share != DistributionSettings.anchor_share:
            raise ValueError("anchor_share would do nothing without an anchor: set anchor too")
        if self.margin < 0 or self.lowest < 1 or self.warmup < 0:
            raise ValueError(
                "margin and warmup are at least 0, lowest at least 1, got "
                f"{self.margin}, {self.warmup}, {self.lowest}"
            )


@dataclass(frozen=True)
class Terms:
    """The two terms of the generator's direction and what the teacher says, [n, ...]; no gradients."""

    dm: Tensor
    ca: Tensor
    real: Tensor


class TrajectoryDistribution(Objective):
    """Trains `network` to take `segments` steps; `conditions` of prompts to draw, `data` for the anchor."""

    Settings: type = DistributionSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"precision": "bf16", "batch": 32},
        "optimizer": {"lr": 3e-5, "floor": 0.1, "warmup": 10},
    }

    def __init__(
        self,
        network: Network,
        conditions: Conditions,
        settings: Any,
        *,
        segments: int,
        data: Trajectories | None = None,
    ) -> None:
        self.network, self.conditions, self.settings, self.data = network, conditions, settings, data
        self.edges = torch.tensor(edges(network.path, segments)[::-1], dtype=torch.float64)
        self.fake = network.copies()

    @classmethod
    def from_job(cls, job: Any) -> TrajectoryDistribution:
        """Return the objective of `diffplug train tdm`."""
        steps = job.config.student.steps
        data = job.trajectories(steps) if cls.needs_store(job) else None
        return cls(job.network, job.conditions, job.objective, segments=steps, data=data)

    @staticmethod
    def needs_store(job: Any) -> bool:
        """Only for the anchor."""
        return bool(job.objective.anchor > 0)

    @staticmethod
    def needs_null(job: Any) -> bool:
        """The teacher guides."""
        return bool(job.objective.guidance > 1)

    def groups(self) -> list[Group]:
        """The student, which waits for the fake's warm-up, and the fake."""
        told = self.settings
        return [
            Group("student", self.network.weights, start=told.warmup),
            Group("fake", self.fake, lr=told.fake_lr, average=False),
        ]

    def loss(self, rows: Rows) -> Loss:
        """Return both losses of one step of the student; they share no parameters."""
        path, j = self.network.path, rows.update % (len(self.edges) - 1)
        x, conditions, stored = self._state(rows, j)
        here, low = (self.edges[i].expand(len(rows)) for i in (j, j + 1))
        said = self.network(x, here, conditions)
        tau = self._between(rows, low, here)
        noise = rows.normal(*x.shape[1:])
        x_tau = path.noised(path.jump(said, low).detach(), noise, low, tau)
        fake = self.network(x_tau, tau, conditions, self.fake)
        found = self._terms(rows, said, fake, x_tau, tau, low, conditions)
        errors = self.student_loss(said.x0, found)
        log = {"student": errors.detach().mean(), "cosine": _cosine(found.dm, found.ca).mean()}
        learnt = self._fake_loss(said.x0.detach(), fake.x0, x_tau, tau, noise)
        log["fake"] = learnt.detach().mean()
        errors = errors + learnt
        if stored is not None:
            gap = (path.jump(said, low) - stored[0]).square().flatten(1).mean(1) * stored[1]
            log["anchor"] = gap.detach().mean()
            errors = errors + self.settings.anchor * gap
        return Loss(errors, log=log, timesteps=path.timesteps(tau))

    def student_loss(self, x0: Tensor, found: Terms) -> Tensor:
        """Return the student's loss of each row."""
        return tdm_loss(x0, found)

    def _state(self, rows: Rows, j: int) -> tuple[Tensor, Conditions, tuple[Tensor, Tensor] | None]:
        """Return states at edge j, their conditions, and for the anchor the stored states after.

        The first rows of the batch begin at stored states where there is an anchor, the others at the
        student's own.
        """
        item = rows.items(len(self.conditions))
        conditions = self.conditions[item].to(rows.device)
        x = rows.normal(*self.network.form.shape)
        with torch.no_grad():
            for i in range(j):
                said = self.network(x, self.edges[i].expand(len(rows)), conditions)
                x = self.network.path.jump(said, self.edges[i + 1].expand(len(rows)))
        if self.data is None:
            return x, conditions, None
        anchored = torch.tensor([row < rows.batch * self.settings.anchor_share for row in rows.rows])
        item = rows.items(len(self.data))
        there, after = (self.data.states[item, j + k].to(rows.device, x.dtype) for k in (0, 1))
        told = self.data.conditions[item].to(rows.device)
        mask = anchored.to(rows.device)
        mixed = {name: _where(mask, told.leaves[name], value) for name, value in conditions.leaves.items()}
        return _where(mask, there, x), Conditions(mixed), (after, mask.to(x.dtype))

    def _between(self, rows: Rows, low: Tensor, high: Tensor) -> Tensor:
        """Return tau, a whole index from above `low` to just below `high`."""
        first = (low + 1).clamp(min=self.settings.lowest)
        span = (high - self.settings.margin - first).clamp(min=1)
        return (first + rows.uniform() * span).floor()

    def _terms(
        self,
        rows: Rows,
        said: Prediction,
        fake: Prediction,
        x_tau: Tensor,
        tau: Tensor,
        low: Tensor,
        conditions: Conditions,
    ) -> Terms:
        """Return DM and CA; the former at noise levels of its own where the settings say so."""
        found = terms(self.network, fake.x0.detach(), x_tau, tau, conditions, self.settings.guidance)
        if self.settings.dm == "step":
            return found
        top = torch.full_like(low, float(self.network.path.train_steps))
        other = self._between(rows, low, top)
        path = self.network.path
        x = path.noised(path.jump(said, low).detach(), rows.normal(*x_tau.shape[1:]), low, other)
        with torch.no_grad():
            own = self.network(x, other, conditions, self.fake).x0
        return Terms(self.network.original(x, other, conditions).x0 - own, found.ca, found.real)

    def _fake_loss(self, x0: Tensor, said: Tensor, x_tau: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return the denoising loss of the fake at each row."""
        alpha, sigma = (v.to(x0.device, x0.dtype) for v in self.network.path.levels(tau))
        shape = (-1, *(1,) * (x0.ndim - 1))
        total = (x_tau - alpha.view(shape) * x0) / sigma.view(shape)
        weight = ((noise.square() - total.square()).flatten(1).mean(1) / 2).exp().clamp(max=5)
        snr = (alpha / sigma).square().clamp(max=5)
        return weight * snr * (said - x0).square().flatten(1).mean(1)

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Nothing but the tuner's."""
        self.network.tuner.updated(update)


@torch.no_grad()
def terms(
    network: Network, fake_x0: Tensor, x: Tensor, tau: Tensor, conditions: Conditions, guidance: float
) -> Terms:
    """Return the terms at states x [n, ...] of indices tau [n], for a fake that says `fake_x0` there."""
    if guidance == 1:
        real = network.original(x, tau, conditions).x0
        return Terms(real - fake_x0, torch.zeros_like(real), real)
    guided, told, free = network.guided(x, tau, conditions, guidance)
    return Terms(told.x0 - fake_x0, (guidance - 1) * (told.x0 - free.x0), guided.x0)


def tdm_loss(x0: Tensor, found: Terms, c: float = 1e-3) -> Tensor:
    """Return TDM's loss [n]: pseudo-Huber to the moved x0, over its distance from the guided teacher's."""
    goal = (x0 + found.dm + found.ca).detach()
    size = (x0 - found.real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return (((x0 - goal).square() + c * c).sqrt() - c).flatten(1).mean(1) / size


def dmd_loss(x0: Tensor, found: Terms) -> Tensor:
    """Return DMD's loss [n] (arXiv 2311.18828): its gradient is -(DM + CA) over mean |x0 - x0_real,g|."""
    size = (x0 - found.real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    direction = (found.dm + found.ca) / size.view(-1, *(1,) * (x0.ndim - 1))
    goal = (x0 + torch.nan_to_num(direction)).detach()
    return 0.5 * (x0 - goal).square().flatten(1).mean(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *(1,) * (b.ndim - 1)), a.to(b.device, b.dtype), b)
