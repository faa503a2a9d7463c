"""What the attention layers of a denoiser have to know of a negative prompt while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Encoded", "NegativeState", "SameScheduler"]


@dataclass(frozen=True)
class Encoded:
    """A prompt as a pipeline encodes it: `text` [n, tokens, d] (or a list of [tokens, d]), and its `mask`."""

    text: Any
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    @property
    def alike(self) -> bool:
        """Whether all rows are the same prompt."""
        first, mask = self.text[0], self.mask
        same = all(row.shape == first.shape and torch.equal(row, first) for row in self.text[1:])
        return same and (mask is None or all(torch.equal(row, mask[0]) for row in mask[1:]))

    def rows(self, index: list[int]) -> Encoded:
        """Return some of the rows."""
        if isinstance(self.text, list):
            return Encoded([self.text[i] for i in index])
        return Encoded(self.text[index], None if self.mask is None else self.mask[index])


class SameScheduler:
    """The scheduler that a run began with."""

    def __init__(self) -> None:
        self.first: Any = None

    def check(self, pipe: Any) -> None:
        """Raise ValueError where a pipeline has another scheduler than at the first check of the run."""
        now = getattr(pipe, "scheduler", None)
        if self.first is None:
            self.first = now
        if now is not self.first:
            raise ValueError(
                f"the scheduler was changed from {type(self.first).__name__} to {type(now).__name__} in the "
                "middle of a run with a negative prompt: change it between two calls"
            )


class NegativeState:
    """The negative prompt of the run, and of the network call that is under way.

    positive, negative: `Encoded` prompts of the run. text [n, tokens, d], bias, time [n] (t / 1000, 0 is
    clean) and guidance (w, a number or [n]) are those of the present call; `text` is None where the
    negative prompt does not act. positive_tokens: length of the prompt in that call. tried: whether the
    negative prompt was to act in this run; acted: whether any layer has used it.
    """

    positive_tokens: int = 0
    tried: bool = False
    acted: bool = False

    def __init__(self) -> None:
        self.positive: Encoded | None = None
        self.negative: Encoded | None = None
        self.forget()

    def clear(self) -> None:
        """Forget the call."""
        self.text: Tensor | None = None
        self.bias: Tensor | None = None
        self.time: Tensor | None = None
        self.guidance: Any = 1.0

    def forget(self) -> None:
        """Forget the run."""
        self.positive = self.negative = None
        self.tried = self.acted = False
        self.late: Callable[[], None] | None = None
        self.same = SameScheduler()
        self._repeated: dict[int, Encoded] = {}
        self.clear()

    def check_acted(self, pipe: Any) -> None:
        """Raise ValueError where a negative prompt was given and no layer of the network has seen it."""
        if self.tried and not self.acted:
            raise ValueError(
                f"the negative prompt has reached no attention layer of this {type(pipe).__name__}: its "
                "denoiser "
                "has none that is guided"
            )

    def ready(self) -> bool:
        """Return whether there is a negative prompt in this run, encoded by now at the latest."""
        if self.negative is None and self.late is not None:
            self.late()
        return self.negative is not None

    def shown_with(self, text: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the negative prompt of each row of a layer's `text`, and the times [n] of the rows.

        They are those of the call, but for a layer that sees a part of its rows, as in windows of AnimateDiff
        frames.
        """
        if self.text is None or len(self.text) == len(text):
            return self.text, self.time
        part = self.aligned(len(text), text).text.to(self.text)
        return part, None if self.time is None else self.time[: len(text)]

    def aligned(self, rows: int, shown: Any) -> Encoded:
        """Return the negative prompt of each row of a network call.

        rows: how many there are. shown: the positive embeddings in the call, by which rows are told apart
        where they are not those of the run, one by one. Raises ValueError where that leaves a doubt.
        """
        negative = self.negative
        if negative is None:
            raise ValueError("no negative prompt has been encoded for this run")
        if rows == len(negative):
            return negative
        if rows not in self._repeated and negative.alike:
            self._repeated[rows] = negative.rows([0] * rows)
        return self._repeated[rows] if rows in self._repeated else negative.rows(self._matched(shown))

    def _matched(self, shown: Any) -> list[int]:
        """Return which prompt of the run each row shows."""
        positive, negative = self.positive, self.negative
        if positive is None or negative is None:
            raise ValueError(
                "the rows of this run cannot be told apart: give one negative prompt for all of them"
            )
        found = []
        for row in shown:
            same = [
                i for i, own in enumerate(positive.text) if own.shape == row.shape and torch.equal(own, row)
            ]
            kinds = negative.rows(same) if same else None
            if kinds is None or not kinds.alike:
                raise ValueError(
                    "the network was given a part of the batch in which equal prompts have different "
                    "negative "
                    "prompts: give one negative prompt for all of them"
                )
            found.append(same[0])
        return found
