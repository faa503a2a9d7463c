"""Guidance with negative prompts in one evaluation: what SpeedUpNet's adapter is trained on (stage 1).

    teacher   y = y(c-) + w (y(c+) - y(c-))        two evaluations, kept once: any w can be drawn later
    student   the base with the adapter, one evaluation
    loss      |student - y|^2 / ((w - 1)^2 d^g m^(1 - g) + f m),    d = |y(c+) - y(c-)|^2

with m the mean of d over all states. With g = 1 a row's loss is the share of guidance that is missing, 1
without an adapter; with g = 0 rows of one scale count by the size of their errors. The empty negative's
offset has a seventh of the power of a real one, and only a g above 0 makes it count. Half of the states
come from guided roll-outs, which is where a sampler goes (as in Adapter Guidance Distillation, arXiv
2503.07274), half are pictures noised afresh. The method's paper (arXiv 2312.08887) was read in its abstract
alone: this objective is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import SunAdapter
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.speedupnet.guidance_states import GuidanceStates, States, StateSettings, TextNetwork
from diffplug.training.speedupnet.negatives import NegativeSettings

__all__ = ["DistillationSettings", "GuidanceDistillation", "weighed_error"]


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The table [objective] of `speedupnet`.

    layout: "large" (queries and output layers of its own) or "small". gate: width of the gates. guidance:
    range of w. evenness: g, from 0 to 1. floor: f. default: guidance scale of calls that ask for none.
    start: file of an adapter to go on from, or "shipped" for the package's own. consistency: evaluations of
    stage 2 (see `multi_step_consistency`), 0 for stage 1; blend: weight of stage 1's loss in it. student: of
    stage 2, a few-step name ("hyper-sd") or the folder of a recipe: the adapter is trained on the model with
    that checkpoint in it, the teacher stays the model without; None trains it on the model itself.
    """

    layout: Literal["large", "small"] = "large"
    gate: int = 64
    guidance: tuple[float, float] = (1.0, 8.0)
    evenness: float = 0.5
    floor: float = 0.1
    default: float = 5.0
    start: str | None = None
    consistency: int = 0
    blend: float = 0.25
    student: str | None = None
    states: StateSettings = field(default_factory=StateSettings)
    negatives: NegativeSettings = field(default_factory=NegativeSettings)

    def __post_init__(self) -> None:
        if not 1 <= self.guidance[0] < self.guidance[1]:
            raise ValueError(f"guidance is a range of scales, 1 or more, got {list(self.guidance)}")
        if not 0 <= self.evenness <= 1:
            raise ValueError(f"evenness must be from 0 to 1, got {self.evenness}")
        if self.consistency < 0 or self.blend < 0:
            raise ValueError(f"consistency and blend are at least 0, got {self.consistency}, {self.blend}")
        if self.student is not None and not self.consistency:
            raise ValueError(
                f"student={self.student!r} is for the second stage: set consistency to its evaluations, or "
                "leave it out"
            )
        if self.student is not None and self.blend:
            raise ValueError(
                f"blend={self.blend:g} would make a few-step student repeat guidance, which it has "
                "in it: set it to 0"
            )
        if self.consistency and (not self.states.rollouts or self.states.steps % self.consistency):
            raise ValueError(
                f"consistency={self.consistency} needs states.rollouts, and "
                f"states.steps={self.states.steps} to be a "
                "multiple of it"
            )
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0, got {self.floor}")


class GuidanceDistillation(Objective):
    """Trains `adapter` so that `network` with it says what `states` hold for guidance."""

    Settings = DistillationSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"updates": 450, "batch": 64, "precision": "bf16"},
        "optimizer": {"lr": 2e-3, "warmup": 30, "floor": 0.02, "betas": [0.9, 0.99], "ema": 0.99},
    }

    def __init__(
        self,
        network: TextNetwork,
        adapter: SunAdapter,
        state: NegativeState,
        states: GuidanceStates,
        settings: DistillationSettings | None = None,
    ) -> None:
        self.network, self.adapter, self.state, self.states = network, adapter, state, states
        self.settings = settings or DistillationSettings()
        self.mean_power = float(states.power.double().mean())

    def groups(self) -> list[Group]:
        """The adapter."""
        return [Group("adapter", dict(self.adapter.named_parameters()))]

    def loss(self, rows: Rows) -> Loss:
        """Return the missing share of guidance of each row, at guidance scales of their own."""
        item = rows.items(len(self.states))
        low, high = self.settings.guidance
        w = (low + (high - low) * rows.uniform()).float().to(rows.device)
        at = self.states.at(item, rows.device)
        said = self.network.guided_at_once(self.state, at, w)
        settings = self.settings
        errors = weighed_error(said, at, w, self.mean_power, settings.evenness, settings.floor)
        empty = at.empty
        log = {"real": _mean(errors, ~empty), "empty": _mean(errors, empty)}
        return Loss(errors, log=log, timesteps=at.timesteps.cpu())

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: what is drawn depends on the seed alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


def weighed_error(said: Tensor, at: States, w: Tensor, mean: float, evenness: float, floor: float) -> Tensor:
    """Return |said - y|^2 / ((w - 1)^2 d^g m^(1 - g) + f m), [n]; squares are means over a row's elements."""
    size = (w - 1).view(-1, *(1,) * (said.ndim - 1))
    offset = at.positive - at.negative
    error = (said - at.positive - size * offset).square().flatten(1).mean(1)
    power = offset.square().flatten(1).mean(1) ** evenness * mean ** (1 - evenness)
    return error / ((w - 1).square() * power + floor * mean)


def _mean(values: Tensor, some: Tensor) -> Tensor:
    chosen = values.detach()[some]
    return chosen.mean() if len(chosen) else values.detach().mean()
