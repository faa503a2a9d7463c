"""Trajectory matching: the student's jump over a segment lands where the teacher's solver lands.

    L = mean over rows of |J(x_j, e_j -> e_j+1; student) - x_j+1|^2 / running mean of its segment

x_j are the states of a stored, guided trajectory at the edges of the student's segments, J the DDIM (or
Euler) jump. A row costs one forward and one backward pass; there is no guidance, second network or picture.
Every segment weighs the same: the raw errors of segments differ by four to six times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.training.config import NoSettings
from diffplug.training.network import Network
from diffplug.training.noise_path import edges
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.trajectories import Trajectories

__all__ = ["TrajectoryMatching"]


class TrajectoryMatching(Objective):
    """Trains `network` to take `segments` steps on trajectories whose columns are the segments' edges."""

    def __init__(self, network: Network, data: Trajectories, segments: int) -> None:
        self.network, self.data, self.segments = network, data, segments
        self.edges = torch.tensor(edges(network.path, segments)[::-1], dtype=torch.float64)
        if data.states.shape[1] != segments + 1:
            raise ValueError(f"{segments} segments need {segments + 1} states, got {data.states.shape[1]}")
        self.scale = SegmentScale(segments)

    Settings = NoSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {"run": {"precision": "bf16"}}

    @classmethod
    def from_job(cls, job: Any) -> TrajectoryMatching:
        """Return the objective of `diffplug train trajectory`."""
        return cls(job.network, job.trajectories(job.config.student.steps), job.config.student.steps)

    @staticmethod
    def needs_store(job: Any) -> bool:
        """Trajectories are all it is trained on."""
        return True

    def groups(self) -> list[Group]:
        """The student."""
        return [Group("student", self.network.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return one segment of a trajectory for each row, every segment equally often."""
        item = rows.items(len(self.data))
        segment = (torch.tensor(list(rows.rows)) + rows.update) % self.segments
        start, end = (self.data.states[item, segment + j].to(rows.device, torch.float32) for j in (0, 1))
        index = self.edges[segment]
        said = self.network(start, index, self.data.conditions[item].to(rows.device))
        landed = self.network.path.jump(said, self.edges[segment + 1])
        errors = (landed - end).square().flatten(1).mean(1)
        return Loss(
            errors / self.scale.of(segment, errors),
            log={"mse": errors.detach().mean()},
            totals=self.scale.totals(segment, errors),
            timesteps=self.network.path.timesteps(index),
        )

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Follow the errors of the segments."""
        self.network.tuner.updated(update)
        self.scale.update(totals)

    def state_dict(self) -> dict[str, Tensor]:
        """The running errors."""
        return {"segment_error": self.scale.error}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the running errors back."""
        self.scale.error = state["segment_error"]


class SegmentScale:
    """A running mean of each segment's error; divided by it, all segments weigh the same."""

    def __init__(self, segments: int, decay: float = 0.9) -> None:
        self.error, self.decay = torch.zeros(segments, dtype=torch.float64), decay

    def of(self, segment: Tensor, like: Tensor) -> Tensor:
        """Return the divisor of each row [n]; 1 before the first update."""
        error = self.error[segment]
        return torch.where(error > 0, error, 1.0).to(like.device, like.dtype)

    def totals(self, segment: Tensor, errors: Tensor) -> dict[str, Tensor]:
        """Return the sums that `update` wants."""
        zero = torch.zeros(len(self.error), dtype=torch.float64)
        summed = zero.scatter_add(0, segment, errors.detach().double().cpu())
        rows = zero.scatter_add(0, segment, torch.ones(len(segment), dtype=torch.float64))
        return {"segment_error": summed.to(errors.device), "segment_rows": rows.to(errors.device)}

    def update(self, totals: Mapping[str, Any]) -> None:
        """Take in the errors of an update."""
        if "segment_rows" not in totals:
            return
        rows, summed = totals["segment_rows"].cpu(), totals["segment_error"].cpu()
        fresh = summed / rows.clamp(min=1)
        known = torch.where(self.error > 0, self.error.lerp(fresh, 1 - self.decay), fresh)
        self.error = torch.where(rows > 0, known, self.error)
