"""SolverTable: what a solver computes, as numbers; every step is linear in states and data predictions.

x_{i+1} = sum of weights times (states x_j, data predictions D_j, states X_j that the network saw), j <= i.
Noise predictions need no history of their own: E_j = (X_j - alpha_j D_j) / sigma_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffplug.noise.noise_level import Level

DATA, STATES, SEEN = 0, 1, 2  # the three histories, in the order in which `Histories` holds them
CONSTANT = 3  # no history: the weight itself is added; only rows with statistics of a model have it
Weight = Any  # a float, or a tensor of a sample's shape where there are statistics of a model
Histories = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Term(NamedTuple):
    """weight times an entry of a history (DATA, STATES, SEEN); `back` counts from its end, -1 the newest.

    CONSTANT: the weight alone, which never comes first in a row.
    """

    history: int
    back: int
    weight: Weight


Row = tuple[Term, ...]


@dataclass(frozen=True)
class TableStep:
    """What happens at node i once the network has been evaluated there, in this order.

    correct: the state x_i from X_i, D_i and the past, None where x_i = X_i. compensate: what takes the place
    of D_i, None for itself. predict: the state at node i + 1.
    """

    predict: Row
    correct: Row | None = None
    compensate: Row | None = None

    def placed(self, x: Tensor) -> TableStep:
        """The rows with their tensors where x is, of x's type."""
        rows = (None if row is None else tuple(_placed(term, x) for term in row) for row in self._all)
        return TableStep(*rows)  # type: ignore[arg-type]

    @property
    def _all(self) -> tuple[Row, Row | None, Row | None]:
        return self.predict, self.correct, self.compensate

    @property
    def rows(self) -> list[Row]:
        """The rows that are there."""
        return [row for row in (self.correct, self.compensate, self.predict) if row is not None]


@dataclass(frozen=True)
class AnalyticStep:
    """The first step without the network: D_0 = gain x_0 + mean, x_1 = scale x_0 + shift mean + constant.

    outside: the part of the scale that is one number, which a pipeline can put on its noise.
    """

    scale: Weight
    shift: Weight
    gain: float
    mean: tuple[float, ...]
    constant: Weight = 0.0

    @property
    def outside(self) -> float:
        return 1.0 if isinstance(self.scale, Tensor) else float(self.scale)

    def prediction(self, noise: Tensor) -> Tensor:
        """D_0."""
        return noise * self.gain + spread(self.mean, noise)

    def inside(self, scaled: Tensor) -> Tensor:
        """x_1 of `outside` times the noise."""
        x = scaled * self.scale.to(scaled) if isinstance(self.scale, Tensor) else scaled
        if any(self.mean):
            x = x + _on(self.shift, x) * spread(self.mean, x)
        return x + _on(self.constant, x) if isinstance(self.constant, Tensor) or self.constant else x


@dataclass(frozen=True)
class SolverTable:
    """The rows of a run, float64 on the host.

    sigmas, levels: of the N + 1 nodes; sigmas as the scheduler stores them. steps: one `TableStep` for each
    node with an evaluation. begin: the first node of the run (larger than 0 for img2img; earlier rows are
    those of that run all the same, but must not be used). first: the analytic step at node 0, if any.
    """

    sigmas: tuple[float, ...]
    levels: tuple[Level, ...]
    steps: tuple[TableStep, ...]
    begin: int = 0
    first: AnalyticStep | None = None

    @property
    def kept(self) -> tuple[int, int, int]:
        """How many entries of each history the rows look at."""
        reach = [1, 1, 0]
        for step in self.steps[self.begin :]:
            for row in step.rows:
                for term in row:
                    if term.history != CONSTANT:
                        reach[term.history] = max(reach[term.history], -term.back)
        return reach[0], reach[1], reach[2]

    def reads_earlier_states(self, node: int) -> bool:
        """Whether a prediction from this node on looks at states before the newest one."""
        rows = [step.predict for step in self.steps[node:]]
        return any(term.history != DATA and term.back < -1 for row in rows for term in row)

    def placed(self, x: Tensor) -> SolverTable:
        """The table with its tensors where x is, of x's type; itself where it has none."""
        terms = (term for step in self.steps for row in step.rows for term in row)
        if not any(isinstance(term.weight, Tensor) for term in terms):
            return self
        return replace(self, steps=tuple(step.placed(x) for step in self.steps))

    def run(
        self,
        denoise: Callable[[Tensor, int], Tensor],
        x: Tensor,
        *,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The state at the last node; x: the state at node `begin`, of any shape.

        denoise(x, i): the data prediction at node i, of x's dtype, called once an evaluation. observe(i, x):
        told every state as it becomes final.
        """
        histories: Histories = ([], [], [])
        for i in range(self.begin, len(self.steps)):
            analytic = self.first if i == 0 else None
            data = denoise(x, i) if analytic is None else analytic.prediction(x)
            state, x = advance(self.steps[i], histories, data, x, self.kept)
            if observe is not None:
                observe(i, state)
        if observe is not None:
            observe(len(self.steps), x)
        return x


def spread(mean: tuple[float, ...], x: Tensor) -> Tensor:
    """The mean as a tensor that broadcasts over x: one number, or one for each channel."""
    values = torch.tensor(mean, dtype=x.dtype, device=x.device)
    return values.reshape(-1, *(1,) * (x.ndim - 2)) if len(mean) > 1 else values


def combine(row: Row, histories: Sequence[Sequence[Tensor]]) -> Tensor:
    """The weighted sum of a row; one multiplication and a fused multiply-add for each further term."""
    history, back, weight = row[0]
    total = histories[history][back] * weight
    for history, back, weight in row[1:]:
        if history == CONSTANT:
            total.add_(weight)
        elif isinstance(weight, Tensor):
            total.addcmul_(histories[history][back], weight)
        else:
            total.add_(histories[history][back], alpha=weight)
    return total


def _on(weight: Weight, x: Tensor) -> Weight:
    return weight.to(x) if isinstance(weight, Tensor) else weight


def _placed(term: Term, x: Tensor) -> Term:
    return term._replace(weight=_on(term.weight, x))


def advance(
    step: TableStep,
    histories: Histories,
    data: Tensor,
    seen: Tensor,
    kept: tuple[int, int, int],
    bound: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(the state of this node, the predicted state of the next one); the histories are moved on.

    data: D_i. seen: X_i. bound: thresholding, applied again where the data prediction is replaced.
    """
    for history, entry, length in zip(histories, (data, seen, seen), kept, strict=True):
        if length:
            history.append(entry)
            del history[:-length]
    if step.correct is not None:
        histories[STATES][-1] = combine(step.correct, histories)
    if step.compensate is not None:
        replaced = combine(step.compensate, histories)
        histories[DATA][-1] = replaced if bound is None else bound(replaced)
    return histories[STATES][-1], combine(step.predict, histories)
