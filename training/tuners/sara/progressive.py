"""The progressive adjustment of SaRA (arXiv 2409.06633): once, on the way, the choice narrows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive:
    """After so many optimiser steps only those entries go on that are still below the threshold.

    fresh_moments: whether the optimiser's moments of those that go on begin anew. Raises ValueError for a
    step below 1.
    """

    after: int
    fresh_moments: bool = False

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(f"progressive is {self.after!r}: give an optimiser step of at least 1")

    @classmethod
    def of(cls, given: int | Progressive | None, score: object) -> Progressive | None:
        """Return the adjustment that was asked for, if any; ValueError with another score than magnitude."""
        if given is None:
            return None
        if score != "magnitude":
            raise ValueError(
                f"progressive is {given!r} with score={score!r}: it asks again how large the weights are, so "
                "take the score 'magnitude'"
            )
        return given if isinstance(given, Progressive) else cls(given)
