"""What the engine asks of a steering rule and of its parts, as protocols and plain values.

A rule gives three answers: which calls of the scheduler are scored (`plan`), which log weights the particles
have, and how survivors are selected (`build_filter`). The engine hands every scored call on as one value, a
`ScoredStep`, and asks nothing back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffplug.intercept import StepCall
    from diffplug.noise.families import Level

Plan = Callable[[int], Iterable[int]]
"""From the number of steps n to the indices of the scored calls, in 0..n-2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredStep:
    """A scheduler call whose particles are scored: n = P * k rows, or this process's share of them.

    call: the arguments of `scheduler.step`. index, steps: which call of how many. progress: share of the run
    done, in (0, 1]. x0: clean prediction `[n, ...]`. here, there: signal and noise before and after the step,
    None for tokens.
    """

    call: StepCall
    index: int
    steps: int
    progress: float
    x0: Tensor
    here: Level | None
    there: Level | None


Score = Callable[[ScoredStep], Tensor]
"""From a scored step to what the states of all rows are worth, `[P * k]`."""


class Chosen(Protocol):
    """What a scored call decided: `ancestors [P, k]`, the slot that every slot continues from."""

    @property
    def ancestors(self) -> Tensor:
        """Return the slots to continue from, `[P, k]` int64."""
        ...


class Filter(Protocol):
    """The log weights of the particles and the way to select among them; see `ParticleFilter`, `Islands`."""

    groups: int
    particles: int
    selections: list[Any]
    generators: Sequence[torch.Generator]

    def select(self, rewards: Tensor, *, call: int, progress: float) -> Chosen:
        """Return the selection for the rewards of a call."""
        ...

    def twisted(self, log_ratio: Tensor) -> None:
        """Take log p/tau of a proposal into the weights."""
        ...

    def finish(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights, log normalisers and checked rewards of the end."""
        ...


class Rule(Protocol):
    """A steering rule: which calls, which log weights, how to select."""

    @property
    def particles(self) -> int:
        """Return k, the particles of every prompt."""
        ...

    def plan(self) -> Plan:
        """Return which calls are scored before the end."""
        ...

    def build_filter(self, groups: int) -> Filter:
        """Return fresh log weights for this many prompts, and the way to select by them."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What a value sees at a scored call: n = P * k rows.

    sample, output: what `scheduler.step` was given, `[n, ...]`. x0: clean prediction `[n, ...]`. level:
    signal and noise of `sample` (None for tokens). prompts: a text for each row. call: index of the scheduler
    call. strength: lambda. rate: from clean latents (or tokens) shaped like `x0` to rewards `[n]` float64.
    """

    sample: Tensor
    output: Tensor
    x0: Tensor
    level: Level | None
    prompts: list[str]
    call: int
    strength: float
    rate: Callable[[Tensor], Tensor]


Value = Callable[[State], Any]
"""From a state on the way to what it is worth, `[n]` numbers in reward units."""
