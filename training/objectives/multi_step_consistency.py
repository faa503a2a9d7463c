"""Multi-step consistency: the adapter's single steps land where guidance lands after several (stage 2).

    x_j               a state of a guided roll-out of N m steps, at the edge of a segment of m
    teacher           x_j+1, the state at the next edge
    student           one DDIM (or Euler) step from x_j over the whole segment, one evaluation
    loss              |student - x_j+1|^2 / running mean of its segment + blend * the loss of stage 1

The published method (arXiv 2312.08887) names such a stage and shows no formula; this one is ours. Landing
points are matched, not noise predictions: at the noisiest step an error of the prediction is magnified by 1
/ alpha. With m = 1 it is stage 1 on the solver's own steps. Start from an adapter of stage 1
(objective.start).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffplug.training.noise_path import NoisePath
from diffplug.training.objective import Loss, Rows
from diffplug.training.objectives.guidance_distillation import GuidanceDistillation
from diffplug.training.objectives.trajectory_matching import SegmentScale
from diffplug.training.speedupnet.guidance_states import States

__all__ = ["MultiStepConsistency", "landed"]


class MultiStepConsistency(GuidanceDistillation):
    """Trains the adapter to take `settings.consistency` steps, at the guidance scale of each roll-out."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.table, self.index = self.states.trajectories()
        self.count = self.settings.consistency
        self.stride = self.table.shape[1] // self.count
        self.scale = SegmentScale(self.count)

    def loss(self, rows: Rows) -> Loss:
        """Return one segment of a guided roll-out for each row, and the loss of stage 1 on other states."""
        row = rows.items(len(self.table))
        segment = (torch.tensor(list(rows.rows)) + rows.update) % self.count
        at = self.states.at(self.table[row, segment * self.stride], rows.device)
        target, there = self._target(row, segment)
        w = self.states.tensors["guidance"][row].to(rows.device)
        said = self.network.guided_at_once(self.state, at, w)
        missed = landed(self.network.path, said, at, there) - target.to(rows.device, torch.float32)
        errors = missed.square().flatten(1).mean(1)
        found = errors / self.scale.of(segment, errors)
        log = {"mse": errors.detach().mean()}
        if self.settings.blend:
            first = super().loss(rows)
            found, log = found + self.settings.blend * first.errors, {**log, **first.log}
        return Loss(found, log=log, totals=self.scale.totals(segment, errors), timesteps=at.timesteps.cpu())

    def _target(self, row: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's states at the ends of segments, and their indices."""
        step = (segment + 1) * self.stride
        last = step == self.table.shape[1]
        inner = step.clamp(max=self.table.shape[1] - 1)
        state = self.states.tensors["x"][self.table[row, inner]]
        mask = last.view(-1, *(1,) * (state.ndim - 1))
        found = torch.where(mask, self.states.tensors["end"][row], state)
        return found, torch.where(last, 0.0, self.index[inner])

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Follow the errors of the segments."""
        self.scale.update(totals)

    def state_dict(self) -> dict[str, Tensor]:
        """The running errors."""
        return {"segment_error": self.scale.error}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the running errors back."""
        self.scale.error = state["segment_error"]


def landed(path: NoisePath, said: Tensor, at: States, there: Tensor) -> Tensor:
    """Return where one deterministic step takes states whose network output is `said`, at indices `there`
    [n].
    """
    return path.jump(path.predict(said, at.x, at.index), there)
