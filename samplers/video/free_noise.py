"""Initial noise whose windows are made of the same frames: FreeNoise (arXiv 2310.15169), and plain
repetition.

The first W frames are free. Each later block of S = W - O frames is a shuffled copy of the frames that lie W
earlier, which are those that leave the window as it moves on by S: so every window sees the same W frames of
noise, each once, in another order. Appearance is kept then, and motion tends to come back every W frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NOISES", "frame_order", "rearranged"]

NOISES = ("iid", "free", "repeat")


def frame_order(
    length: int, window: int, overlap: int, kind: str, generator: torch.Generator | None = None
) -> list[int]:
    """Return which frame of the first window each of `length` frames of noise copies.

    kind: "free" shuffles block by block with `generator`; "repeat" is j mod W. The last block, where it is
    shorter, is a permutation of as many frames.
    """
    if kind == "repeat":
        return [j % window for j in range(length)]
    order = list(range(min(length, window)))
    stride = window - overlap
    for start in range(window, length, stride):
        block = order[start - window : start - window + min(stride, length - start)]
        order += [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
    return order


def rearranged(noise: Tensor, axis: int, orders: Sequence[Sequence[int]]) -> Tensor:
    """Return noise whose frames are copies of its first ones, row by row; `orders` has one order a row."""
    rows = [
        row.index_select(axis - 1, torch.as_tensor(order, device=noise.device))
        for row, order in zip(noise, orders, strict=True)
    ]
    return torch.stack(rows)
