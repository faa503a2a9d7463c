"""A pull towards low rank for the trained entries of a matrix: the subgradient of its nuclear norm.

    L = weight * ||P||_*,    dL/dP = weight * U V^T at the trained entries    (arXiv 2409.06633, eq. 4-5)

P has the trained entries and zeros elsewhere. Only the polar factor U V^T is needed, no singular vectors, and
none may be dropped: the small singular values are where the subgradient acts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffplug.registry import unknown
from diffplug.training.tuners.sara.entry import Entry

__all__ = ["RankTerm", "polar"]

_COARSE, _FINE = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)


@dataclass(frozen=True)
class RankTerm:
    """The rank term of SaRA.

    weight: lambda, 5e-3 as published. mode: "decoupled" takes lr * lambda * UV^T off after the step, as
    AdamW's decay; "coupled" adds lambda * UV^T to the gradient, where Adam rescales it. of: "values", the
    trained weights, or "delta", their changes. every: optimiser steps between two. matrices: how many each
    time, in turn. smallest, fewest: matrices of a side up to this, or of so few trained entries, are left
    out.
    """

    weight: float = 5e-3
    mode: Literal["decoupled", "coupled"] = "decoupled"
    of: Literal["values", "delta"] = "values"
    every: int = 1
    matrices: int = 1
    smallest: int = 64
    fewest: int = 100

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"the weight of the rank term must be above 0, got {self.weight}: leave it out for none"
            )
        for name, allowed in (("mode", ("decoupled", "coupled")), ("of", ("values", "delta"))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), list(allowed))
        if self.every < 1 or self.matrices < 1:
            raise ValueError(f"every and matrices are at least 1, got {self.every} and {self.matrices}")

    @torch.no_grad()
    def into_gradients(self, entries: Sequence[Entry], step: int) -> None:
        """Add the term to the gradients of the matrices whose turn it is."""
        for entry in self._turn(entries, step):
            if entry.vector.grad is not None:
                entry.vector.grad.add_(self.pull(entry), alpha=self.weight)

    @torch.no_grad()
    def after_step(self, entries: Sequence[Entry], step: int, rate: Callable[[Entry], float]) -> None:
        """Take the term off the vectors of the matrices whose turn it is; rate: the learning rate of each."""
        for entry in self._turn(entries, step):
            entry.vector.sub_(self.pull(entry), alpha=rate(entry) * self.weight)

    def pull(self, entry: Entry) -> Tensor:
        """Return (U V^T) at the trained entries, [k]."""
        values = entry.vector.detach() if self.of == "values" else entry.delta
        shape = entry.weight.shape
        flat = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
        flat[entry.index.long()] = values
        return polar(flat.view(shape[0], -1)).reshape(-1)[entry.index.long()].to(values.dtype)

    def _turn(self, entries: Sequence[Entry], step: int) -> list[Entry]:
        """Return the matrices whose turn it is, the same on every process."""
        able = [entry for entry in entries if self._able(entry)]
        if step % self.every or not able:
            return []
        first = step // self.every * self.matrices
        return [able[(first + i) % len(able)] for i in range(min(self.matrices, len(able)))]

    def _able(self, entry: Entry) -> bool:
        shape = entry.weight.shape
        if hasattr(entry.weight, "device_mesh"):
            raise ValueError("the rank term needs whole matrices: leave it out under fully_shard")
        side = min(shape[0], shape.numel() // shape[0])
        return len(shape) > 1 and side > self.smallest and len(entry.index) > self.fewest


def polar(matrix: Tensor) -> Tensor:
    """Return the polar factor U V^T of a matrix [m, n].

    On a GPU by Newton-Schulz, seven products in place of a decomposition, whose spectrum reaches 1 but for
    the smallest singular values: the gradient of a smoothed norm.
    """
    if matrix.device.type == "cpu":
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return (u @ v).to(matrix.dtype)
    return newton_schulz(matrix)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return the polar factor by five coarse and two fine steps of Newton-Schulz."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix) / matrix.norm().clamp(min=1e-30)
    for a, b, c in (_COARSE,) * 5 + (_FINE,) * 2:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
