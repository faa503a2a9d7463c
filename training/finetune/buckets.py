"""Sizes of about equal area for pictures of different aspect ratios, and batches of one size each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["batch_of", "best_size", "bucket_sizes", "epoch_length"]

Size = tuple[int, int]


def bucket_sizes(size: int, step: int, most: float = 2.0) -> list[Size]:
    """Return (width, height) in multiples of `step`, of at most size^2 pixels, up to an aspect of `most`.

    The square of `size` comes first; of each width there is the largest height that fits.
    """
    if size < step or size % step:
        raise ValueError(
            f"data.size is {size}: take a multiple of {step}, which the model halves its pictures by"
        )
    found = {(size, size)}
    for width in range(step, math.floor(size * math.sqrt(most)) + 1, step):
        height = size * size // width // step * step
        if height >= step and max(width / height, height / width) <= most:
            found |= {(width, height), (height, width)}
    return [(size, size), *sorted(found - {(size, size)})]


def best_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the size whose aspect ratio is nearest to a picture's, in logarithms."""
    return min(sizes, key=lambda one: abs(math.log(one[0] / one[1]) - math.log(width / height)))


def epoch_length(counts: Sequence[int], batch: int) -> int:
    """Return the number of batches that show every picture once."""
    return sum(-(-count // batch) for count in counts)


def batch_of(counts: Sequence[int], batch: int, update: int, seed: int) -> tuple[int, list[int]]:
    """Return the bucket of an update, and the pictures [batch] in it.

    counts: pictures of each bucket. Every picture comes once an epoch; a bucket's last batch is filled up
    with pictures of the same epoch. A function of (seed, update) alone.
    """
    length = epoch_length(counts, batch)
    bucket, items = _epoch(tuple(counts), batch, update // length, seed)[update % length]
    return bucket, list(items)


@lru_cache(maxsize=2)
def _epoch(counts: tuple[int, ...], batch: int, epoch: int, seed: int) -> list[tuple[int, tuple[int, ...]]]:
    rng = np.random.default_rng([seed, epoch, 17])
    batches: list[Any] = []
    for bucket, count in enumerate(counts):
        order = rng.permutation(count)
        filled = np.resize(order, -(-count // batch) * batch) if count else order
        batches += (
            [(bucket, tuple(int(i) for i in part)) for part in filled.reshape(-1, batch)] if count else []
        )
    return [batches[int(i)] for i in rng.permutation(len(batches))]
