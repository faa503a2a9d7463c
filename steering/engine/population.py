"""The particles of one run: which calls are scored, who continues from whom, and how it ended.

This is all of steering that needs neither a scheduler nor a pipeline. `step.py` puts it around
`scheduler.step`, `diffplug.steering.crowd` into a loop of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffplug.steering.engine.history import Rows
from diffplug.steering.engine.outputs import best_first
from diffplug.steering.engine.rule import Filter, Plan, Rule
from diffplug.steering.engine.score_times import no_call
from diffplug.steering.engine.slots import Slots
from diffplug.steering.smc.filter import checked_rewards
from diffplug.steering.smc.resampling import resample


class Choosing(Rule, Protocol):
    """A rule that also says what the final weights stand for and which pictures come first."""

    needs_noise: ClassVar[bool]

    @property
    def weight(self) -> float: ...
    @property
    def scores(self) -> bool: ...
    @property
    def leaders_first(self) -> bool: ...


@dataclass(frozen=True)
class Unscored:
    """A rule as it is where the reward is not needed: nothing is scored on the way."""

    rule: Rule

    @property
    def particles(self) -> int:
        """Return k."""
        return self.rule.particles

    def plan(self) -> Plan:
        """Return the plan that scores nothing."""
        return no_call

    def build_filter(self, groups: int) -> Filter:
        """Return the rule's own filter, which is never asked."""
        return self.rule.build_filter(groups)


class Population:
    """k particles for each of P groups in a run of so many steps; `filter` holds weights and selections.

    `moves` keeps, by call, where every row continued from.
    """

    def __init__(self, rule: Rule, slots: Slots, groups: int, steps: int) -> None:
        self.slots, self.steps = slots, steps
        self.due = sorted(rule.plan()(steps))
        self.filter = rule.build_filter(groups)
        self.moves: dict[int, Rows] = {}

    def is_due(self, call: int) -> bool:
        """Return whether a call is to be scored."""
        return bool(self.due) and call >= self.due[0]

    def select(self, rewards: Tensor, call: int) -> Rows | None:
        """Return the rows to continue from, by the rewards `[P * k]` of a call; None where all stay."""
        self.due = [due for due in self.due if due > call]
        done = (call + 1) / max(self.steps, call + 1)  # the share of the run, in (0, 1]
        chosen = self.filter.select(rewards, call=call, progress=done)
        rows = self.slots.moved(chosen.ancestors)
        if rows is not None:
            self.moves[call] = rows
        return rows


@dataclass(frozen=True)
class Ending:
    """How a run ended: `[P, k]` rewards and log weights, `[P]` log normalisers, rewards that are none."""

    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    invalid: int = 0

    @classmethod
    def judged(cls, particles: Filter, rated: Tensor) -> Ending:
        """Return the end of a run whose finished results have these rewards, `[P * k]`."""
        logw, log_z, final = particles.finish(rated)
        return cls(final, logw, log_z, checked_rewards(rated)[1])

    @classmethod
    def unscored(cls, groups: int, particles: int) -> Ending:
        """Return the end of a run whose reward is not needed."""
        unknown = torch.full((groups, particles), torch.nan, dtype=torch.float64)
        return cls(unknown, torch.zeros(groups, particles), torch.zeros(groups))

    def nothing_valid(self, rule: Choosing, group: int) -> bool:
        """Return whether a group was scored, and no result of it has a reward."""
        return rule.scores and not bool(torch.isfinite(self.rewards[group]).any())

    def best(self, rule: Choosing, particles: Filter, group: int) -> list[int]:
        """Return the slots of a group, best first; in slot order where nothing tells them apart."""
        if not rule.scores or self.nothing_valid(rule, group):
            return list(range(particles.particles))
        apart = getattr(particles, "apart", 1) if rule.leaders_first else 1
        return best_first(self.rewards[group], apart)

    def sample(self, particles: Filter, group: int, n: int) -> list[int]:
        """Return n slots of a group, drawn by the final weights."""
        generators = particles.generators
        return resample(self.log_weights[group], generators[group % len(generators)], n=n).tolist()
