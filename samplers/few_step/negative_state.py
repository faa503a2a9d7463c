"""What the attention layers of a denoiser have to know of a negative prompt while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Encoded", "NegativeState"]


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


class NegativeState:
    """The negative prompt of the run, and of the network call that is under way.

    positive, negative: `Encoded` prompts of the run. text [n, tokens, d], bias, time [n] (t / 1000, 0 is clean)
    and guidance (w, a number or [n]) are those of the present call; `text` is None where the negative prompt
    does not act.
    """

    def __init__(self) -> None:
        self.positive: Encoded | None = None
        self.negative: Encoded | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.text: Tensor | None = None
        self.bias: Tensor | None = None
        self.time: Tensor | None = None
        self.guidance: Any = 1.0
        self._aligned: tuple[int, Encoded, Encoded] | None = None

    def forget(self) -> None:
        """Forget the run."""
        self.positive = self.negative = None
        self.clear()

    def aligned(self, rows: int, shown: Any) -> Encoded:
        """Return the negative prompt of each row of a network call.

        rows: how many there are. shown: the positive embeddings in the call, by which rows are told apart where
        they are not all of the run's, or more than them. Raises ValueError where that leaves a doubt.
        """
        negative = self.negative
        if negative is None:
            raise ValueError("no negative prompt has been encoded for this run")
        if self._aligned is not None and self._aligned[0] == rows and self._aligned[1] is negative:
            whole = rows == len(negative) or negative.alike
            if whole:
                return self._aligned[2]
        if rows == len(negative):
            found = negative
        elif negative.alike:
            found = negative.rows([0] * rows)
        else:
            return negative.rows(self._matched(shown))
        self._aligned = (rows, negative, found)
        return found

    def _matched(self, shown: Any) -> list[int]:
        """Return which prompt of the run each row shows."""
        positive, negative = self.positive, self.negative
        if positive is None or negative is None:
            raise ValueError("the rows of this run cannot be told apart: give one negative prompt for all of them")
        found = []
        for row in shown:
            same = [i for i, own in enumerate(positive.text) if own.shape == row.shape and torch.equal(own, row)]
            kinds = negative.rows(same) if same else None
            if kinds is None or not kinds.alike:
                raise ValueError(
                    "the network was given a part of the batch in which equal prompts have different negative "
                    "prompts: give one negative prompt for all of them"
                )
            found.append(same[0])
        return found
