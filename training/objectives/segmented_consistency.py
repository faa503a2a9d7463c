"""Segmented consistency: the student's jump to a point of its segment agrees along the teacher's path.

Hyper-SD's trajectory segmented consistency distillation (arXiv 2404.13686, section 3.1), with LCM
(2310.04378), TCD (2402.19159) and PCM (2405.18407) as settings:

    x_t          a noised picture, or a state of a stored trajectory
    x_t'         one step of the teacher from t to t' = max(t - T / N, t_b)
    target       J(x_t', t' -> s; average student), no gradient; x_t' itself where s = t'
    loss         d(J(x_t, t -> s; student), target)

t_b is the edge of the segment strictly below t. s is t_b with probability `p_edge` (1: PCM, and with one
segment LCM), else uniform between t_b and t' (0: TCD with one segment, the paper with 8, 4, 2, 1). From the
second stage on the student of the stage before is the teacher, without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.noise_path import edges
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.objectives.latents import Latents, source_of
from diffplug.training.student import Sampling

__all__ = ["ConsistencySettings", "SegmentedConsistency", "distance", "edge_below"]


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings:
    """The table [objective] of `hyper-sd`.

    segments: of each stage, the last one's is the student's number of steps (1: any number of steps, by TCD).
    points: solver points of the first stage, and of later ones where the base teaches; a previous student
    teaches in steps of a quarter of a segment.
    p_edge: probability that s is the segment's edge. teacher: of later stages, "previous" (student) or
    "base". guidance: range of the first stage's guidance scale (two equal numbers for a fixed one; 1 for
    none). target: "average" (decay `target_decay`) or "online". source: "latents" (data.pictures, or the end
    points of stored trajectories) noised afresh, or "trajectories", whose next state is the teacher's step,
    read.
    """

    segments: tuple[int, ...] = (8, 4)
    points: int = 40
    p_edge: float = 0.5
    teacher: Literal["previous", "base"] = "previous"
    guidance: tuple[float, float] = (5.0, 5.0)
    target: Literal["average", "online"] = "average"
    target_decay: float = 0.95
    loss: Literal["mse", "huber"] = "mse"
    offset_noise: float = 0.0
    source: Literal["latents", "trajectories"] = "latents"

    def __post_init__(self) -> None:
        if not self.segments or min(self.segments) < 1:
            raise ValueError(f"segments are whole numbers of at least 1, got {list(self.segments)}")
        if not 0 <= self.p_edge <= 1:
            raise ValueError(f"p_edge must be from 0 to 1, got {self.p_edge}")
        if not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is (lowest, highest), got {list(self.guidance)}")
        if self.points < self.segments[0]:
            raise ValueError(f"points must be at least the {self.segments[0]} segments, got {self.points}")
        if self.source == "trajectories" and len(self.segments) > 1 and self.teacher == "previous":
            raise ValueError(
                "stored trajectories hold the base teacher's steps: take objective.teacher=base, or one stage"
            )


class SegmentedConsistency(Objective):
    """One stage: `segments` of the path, a solver of `points` steps, and who teaches.

    teacher: weights of the student before, None for the model before tuning, with guidance.
    """

    Settings = ConsistencySettings
    DEFAULTS: ClassVar[dict[str, Any]] = {"run": {"precision": "bf16"}, "optimizer": {"ema": 0.95}}

    def __init__(
        self,
        network: Network,
        data: Latents,
        settings: ConsistencySettings,
        *,
        segments: int,
        points: int,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network, self.data, self.settings, self.teacher = network, data, settings, teacher
        self.length = edges(network.path, segments)[1]
        self.stride = network.path.train_steps / points
        self.points = points
        self.target = {name: value.detach().clone() for name, value in network.weights.items()}

    @classmethod
    def from_job(cls, job: Any, stage: int = 0) -> SegmentedConsistency:
        """Return the objective of a stage of `diffplug train hyper-sd`."""
        told: ConsistencySettings = job.objective
        segments = told.segments[stage]
        previous = told.teacher == "previous" and stage > 0
        points = 4 * segments if previous else told.points
        data = source_of(job, trajectories=told.source == "trajectories")
        if told.source == "trajectories":
            points = job.config.teacher.steps
        teacher = job.previous if previous else None
        return cls(job.network, data, told, segments=segments, points=points, teacher=teacher)

    @staticmethod
    def stages(job: Any) -> int:
        """One for every number of segments."""
        return len(job.objective.segments)

    @staticmethod
    def needs_store(job: Any) -> bool:
        """Without pictures, the teacher's trajectories are what is noised."""
        return job.objective.source == "trajectories" or job.config.data.pictures is None

    @staticmethod
    def reads_pictures(job: Any) -> bool:
        """They may be what is noised."""
        return bool(job.objective.source == "latents")

    @staticmethod
    def needs_null(job: Any) -> bool:
        """The base teaches with guidance, but where its steps are read from trajectories."""
        told: ConsistencySettings = job.objective
        return told.guidance[1] > 1 and told.source == "latents" and job.config.student.guidance is None

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for stages that the model's timesteps do not divide into."""
        for k in job.objective.segments:
            edges(job.path, k)
        _refuse_idle(job.objective)
        if job.objective.segments[-1] != job.config.student.steps and job.objective.segments[-1] != 1:
            raise ValueError(
                f"objective.segments end with {job.objective.segments[-1]}, student.steps is "
                f"{job.config.student.steps}: end with the student's steps, or with 1 for any number of steps"
            )

    @staticmethod
    def sampling(job: Any) -> Sampling:
        """The edges' steps for a segment student; 1 to 8 for one with a single segment."""
        student = job.config.student
        steps = (1, 2, 4, 5, 8) if job.objective.segments[-1] == 1 else (student.steps,)
        return Sampling(job.path, steps, student.eta, student.guidance)

    def groups(self) -> list[Group]:
        """The student."""
        return [Group("student", self.network.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the consistency error of each row."""
        path, states = self.network.path, self.data.draw(rows, self)
        t, below = states.index, states.below
        s = self._end(rows, t, below)
        with torch.no_grad():
            stepped = (
                self._taught(rows, states.x, t, below, states.conditions)
                if states.next is None
                else states.next
            )
            weights = None if self.settings.target == "online" else self.target
            target = path.jump(self.network(stepped, below, states.conditions, weights), s)
            here = (s == below).to(rows.device).view(-1, *(1,) * (target.ndim - 1))
            target = torch.where(here, stepped, target)
        said = path.jump(self.network(states.x, t, states.conditions), s)
        errors = distance(said, target, self.settings.loss)
        return Loss(errors, timesteps=path.timesteps(t))

    def _end(self, rows: Rows, t: Tensor, below: Tensor) -> Tensor:
        """Return s: the segment's edge with probability p_edge, else uniform between it and t'."""
        edge = edge_below(t, self.length)
        free = edge + rows.integers(0, (below - edge).long() + 1)
        at_edge = rows.uniform() < self.settings.p_edge
        return torch.where(at_edge, edge.double(), free.double())

    def start(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return t on the solver's grid, and t' one solver step below, within the segment; [n] each."""
        t = ((1 + rows.integers(0, self.points)) * self.stride).round()
        return t, torch.maximum((t - self.stride).round(), edge_below(t, self.length))

    def _taught(self, rows: Rows, x: Tensor, t: Tensor, below: Tensor, conditions: Conditions) -> Tensor:
        """Return the teacher's step from t to t'."""
        if self.teacher is not None:
            said = self.network(x, t, conditions, self.teacher)
        elif self.settings.guidance[1] > 1 and self.network.null is not None:
            low, high = self.settings.guidance
            scale = low + (high - low) * rows.uniform()
            said, _, _ = self.network.guided(x, t, conditions, scale)
        else:
            said = self.network.original(x, t, conditions)
        return self.network.path.jump(said, below)

    @torch.no_grad()
    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Let the target follow the student."""
        self.network.tuner.updated(update)
        mine, other = (
            list(self.target.values()),
            [self.network.weights[name].detach() for name in self.target],
        )
        torch._foreach_lerp_(mine, other, 1 - self.settings.target_decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The target's weights."""
        return dict(self.target)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the target's weights back."""
        for name, value in self.target.items():
            value.copy_(state[name])


def _refuse_idle(told: ConsistencySettings) -> None:
    """Raise ValueError for a setting that another one leaves without effect."""
    plain = ConsistencySettings()
    idle = ["points", "guidance", "offset_noise"] if told.source == "trajectories" else []
    why = dict.fromkeys(idle, "source='trajectories'")
    if told.target == "online":
        why["target_decay"] = "target='online'"
    for name, cause in why.items():
        if getattr(told, name) != getattr(plain, name):
            raise ValueError(f"objective.{name} would do nothing with objective.{cause}: leave it out")


def edge_below(t: Tensor, length: int) -> Tensor:
    """Return the edge of the segment strictly below indices t > 0, for segments of `length` indices."""
    return (t - 1).div(length, rounding_mode="floor") * length


def distance(said: Tensor, target: Tensor, kind: str, c: float = 1e-3) -> Tensor:
    """Return the mean squared error of each row [n], or the pseudo-Huber distance sqrt(e^2 + c^2) - c."""
    gap = (said - target).square()
    gap = gap if kind == "mse" else (gap + c * c).sqrt() - c
    return gap.flatten(1).mean(1)
