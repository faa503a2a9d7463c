"""Draws in portions, which end when they are good enough or the time is up."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.checks import check_number
from diffplug.intercept import intercept_step
from diffplug.steering.engine.outputs import best_first
from diffplug.steering.engine.request import count_name, read_request
from diffplug.steering.engine.run import SteeredRun, Steering
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.some_prompts import gathered, of_prompts
from diffplug.steering.report import SUMS, SteeringReport


class Portioned(Steering, Protocol):
    """A steerer that draws in portions."""

    @property
    def until(self) -> Until: ...

    def portion(self, size: int, chosen: Sequence[int]) -> Steering:
        """Return the rule of one portion: so many free draws of some prompts."""
        ...


@dataclass(frozen=True)
class Until:
    """When drawing ends: at a reward, or after so many seconds.

    Raises ValueError for a reward that is no finite number, and for seconds that are not above 0.
    """

    enough: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("enough", "seconds"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                if not math.isfinite(value):
                    raise ValueError(f"{name}={value}: give a finite number, or None")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds}: give a time above 0, or None")

    def check_within(self, reward: Any) -> None:
        """Raise ValueError for a wanted reward that this one cannot reach."""
        best = getattr(reward, "best", None)
        if self.enough is not None and isinstance(best, (int, float)) and self.enough > best:
            raise ValueError(
                f"enough={self.enough} would never be reached: this reward is at most {best:g}, give that"
            )

    def __bool__(self) -> bool:
        return self.enough is not None or self.seconds is not None

    def reached(self, rewards: Tensor, wanted: int) -> bool:
        """Return whether a prompt with these rewards, those of draws not made NaN, has what it wants."""
        return self.enough is not None and int((rewards >= self.enough).sum()) >= wanted

    def late(self, start: float) -> bool:
        """Return whether the time is up."""
        return self.seconds is not None and perf_counter() - start >= self.seconds


@dataclass(frozen=True)
class SeededSlots(Slots):
    """Slots whose particles have generators of their own: a draw is the same in whichever portion it is."""

    @property
    def every_seed(self) -> bool:
        """Return True."""
        return True


class PortionedRun:
    """One call of a pipeline as several, of `batch` draws for each prompt that is not done yet.

    Draw j of a prompt has the generator that slot j has in a call of all draws at once, so that its picture
    is the same; a prompt stops at the end of the first portion in which it has enough.
    """

    def __init__(self, rule: Portioned, batch: int, pipe: Any, kwargs: dict[str, Any]) -> None:
        self.rule, self.batch, self.pipe, self.kwargs = rule, batch, pipe, kwargs
        self.request = read_request(pipe, kwargs, SeededSlots(rule.particles))
        shape = self.request.groups, rule.particles
        self.rewards = torch.full(shape, torch.nan, dtype=torch.float64)
        self.judged = torch.full(shape, torch.nan, dtype=torch.float64)
        self.draws = [0] * self.request.groups
        self.parts: list[tuple[Any, int]] = []
        self.places: dict[tuple[int, int], tuple[int, int]] = {}
        self.reports: list[SteeringReport] = []

    def __call__(self, call: Callable[..., Any]) -> Any:
        """Return the pipeline's output with the best pictures of every prompt."""
        start, until, wanted = perf_counter(), self.rule.until, self.request.wanted
        begin, left = 0, list(range(self.request.groups))
        while left and begin < self.rule.particles:
            slots = range(
                begin, min(begin + max(self.batch, wanted if begin == 0 else 1), self.rule.particles)
            )
            self._draw(call, left, slots)
            begin = slots.stop
            left = [group for group in left if not until.reached(self.rewards[group], wanted)]
            if until.late(start):
                break
        self.returned = [self._chosen(group) for group in range(self.request.groups)]
        self.seconds = perf_counter() - start
        picks = [self.places[group, slot] for group, slots in enumerate(self.returned) for slot in slots]
        return gathered(self.parts, picks)

    def _draw(self, call: Callable[..., Any], groups: Sequence[int], slots: range) -> None:
        """Run these slots of these prompts, and keep what came of them."""
        here = SeededSlots(len(slots))
        request = read_request(self.pipe, self._arguments(groups, slots), here)
        run = SteeredRun(self.rule.portion(len(slots), groups), self.pipe, request, here)
        undo = intercept_step(self.pipe.scheduler, run.engine)
        try:
            output = run(call)
        finally:
            undo()
        for row, (group, slot) in enumerate((group, slot) for group in groups for slot in slots):
            self.places[group, slot] = len(self.parts), row
        self.parts.append((output, len(groups) * len(slots)))
        self.rewards[list(groups), slots.start : slots.stop] = run.outcome.rewards
        if run.judged is not None:
            self.judged[list(groups), slots.start : slots.stop] = run.judged.reshape(len(groups), -1)
        for group in groups:
            self.draws[group] = slots.stop
        self.reports.append(run.report())

    def _arguments(self, groups: Sequence[int], slots: range) -> dict[str, Any]:
        """Return the arguments of the call for some draws of some prompts."""
        given, k = of_prompts(self.kwargs, groups, self.request.groups), self.rule.particles
        rows = [group * k + slot for group in groups for slot in slots]
        if "generator" in inspect.signature(type(self.pipe).__call__).parameters:
            given["generator"] = [self.request.kwargs["generator"][row] for row in rows]
        if self.kwargs.get("latents") is not None:
            given["latents"] = self.kwargs["latents"][rows]
        count = count_name(self.pipe)
        return given | ({count: len(groups) if count == "batch_size" else 1} if count else {})

    def _chosen(self, group: int) -> list[int]:
        """Return the slots of a prompt that are handed back, best first; the first of equals, as ever."""
        drawn = self.rewards[group, : self.draws[group]]
        order = best_first(torch.where(torch.isfinite(drawn), drawn, -torch.inf))
        return order[: self.request.wanted]

    def report(self) -> SteeringReport:
        """Return one report of all portions."""
        groups, k = self.rewards.shape
        weights = torch.where(torch.isnan(self.rewards), -torch.inf, 0.0)
        return replace(
            self.reports[0],
            method=type(self.rule).__name__,
            particles=k,
            prompts=tuple(self.reports[0].prompts) if groups else (),
            rewards=torch.empty(0, groups, k),
            ancestors=torch.empty(0, groups, k),
            log_z=torch.zeros(groups, dtype=torch.float64),
            final_rewards=self.rewards,
            final_log_weights=weights,
            judge_rewards=None if self.reports[0].judge_rewards is None else self.judged,
            returned=tuple(tuple(slots) for slots in self.returned),
            draws=tuple(self.draws),
            total_seconds=self.seconds,
            invalid_rewards=sum(report.invalid_rewards for report in self.reports),
            **{name: sum(getattr(report, name) for report in self.reports) for name in SUMS},
        )
