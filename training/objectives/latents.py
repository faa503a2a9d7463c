"""States to start a consistency step from: clean latents noised afresh, or states of stored trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.objective import Rows

__all__ = ["CleanLatents", "Latents", "Started", "StoredSteps", "source_of"]


@dataclass(frozen=True)
class Started:
    """States x [n, ...] at indices [n]; `below`: where the teacher steps to; `next`: its state there."""

    x: Tensor
    index: Tensor
    below: Tensor
    conditions: Conditions
    next: Tensor | None = None


class Latents(Protocol):
    """Where an objective's rows begin."""

    def draw(self, rows: Rows, objective: Any) -> Started:
        """Return a state for each row. objective: has `network`, `settings`, `start(rows)`."""


@dataclass(frozen=True)
class CleanLatents:
    """Clean latents [n, ...] with their conditions; noise is added to them.

    null: condition of the empty prompt, one row, which takes the place of a share of `drop` of them.
    """

    latents: Tensor
    conditions: Conditions
    null: Conditions | None = None
    drop: float = 0.0

    def draw(self, rows: Rows, objective: Any) -> Started:
        """Return noised latents, with offset noise where the settings ask for it."""
        item = rows.items(len(self.latents))
        x0 = self.latents[item].to(rows.device, torch.float32)
        eps = rows.normal(*x0.shape[1:])
        strength = objective.settings.offset_noise
        if strength:
            eps = eps + strength * rows.normal(x0.shape[1], *(1,) * (x0.ndim - 2))
        index, below = objective.start(rows)
        x = objective.network.path.noised(x0, eps, torch.zeros_like(index), index)
        conditions = self.conditions[item] if self.conditions.leaves else self.conditions
        if self.null is not None and self.drop:
            conditions = conditions.replaced(rows.uniform() < self.drop, self.null)
        return Started(x, index, below, conditions.to(rows.device))


@dataclass(frozen=True)
class StoredSteps:
    """States [n, m + 1, ...] of trajectories at indices [m + 1], noisiest first."""

    states: Tensor
    index: Tensor
    conditions: Conditions

    def draw(self, rows: Rows, objective: Any) -> Started:
        """Return a stored state and the one that the teacher's solver made of it."""
        item, column = rows.items(len(self.states)), rows.integers(0, len(self.index) - 1)
        x, after = (self.states[item, column + j].to(rows.device, torch.float32) for j in (0, 1))
        return Started(
            x, self.index[column], self.index[column + 1], self.conditions[item].to(rows.device), after
        )


def source_of(job: Any, *, trajectories: bool = False) -> Latents:
    """Return what a job's config trains on: pictures, else the stored trajectories or their end points."""
    if job.pictures is not None and not trajectories:
        kept = job.config.student.guidance is not None  # guidance needs the empty prompt to be learnt too
        null = job.null if kept else None
        return CleanLatents(job.pictures.latents, job.pictures.conditions, null, job.config.data.drop)
    steps = job.config.teacher.steps
    grid = [job.path.train_steps * (1 - j / steps) for j in range(steps + 1)] if trajectories else [0.0]
    wanted = grid if job.path.flow else [float(round(i)) for i in grid]
    teacher = job.config.teacher
    if teacher.filter is not None:
        job.store.keep_right(teacher.filter, teacher.keep, teacher.trajectories)
    stored = job.store.load(wanted, teacher.trajectories)
    if trajectories:
        return StoredSteps(stored.states, stored.index, stored.conditions)
    return CleanLatents(stored.states[:, 0], stored.conditions)
