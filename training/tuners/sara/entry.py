"""The trained entries of one tensor: where they are, what they were, and the vector that learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffplug.sara.targets import local, values_at, write_at

__all__ = ["Entry", "Frozen"]


@dataclass(frozen=True)
class Frozen:
    """Entries that have stopped learning: positions, originals and differences, on the CPU."""

    index: Tensor
    before: Tensor
    delta: Tensor


class Entry:
    """Some entries of a tensor.

    component, name: which tensor. weight: the parameter itself. index: int32 [k], flat positions in C order
    (of this process's rows). before: [k], the values at first. vector: [k], what learns, in float32 or wider.
    threshold: below which weights were chosen. frozen: entries that have stopped. stale: a gradient has come
    since the weight was written, so that a step may have followed; fused optimisers do not count versions.
    """

    def __init__(
        self, component: str, name: str, weight: nn.Parameter, index: Tensor, threshold: float
    ) -> None:
        self.component, self.name, self.weight, self.threshold = component, name, weight, threshold
        self.index = index.to(local(weight.detach()).device)
        self.before = values_at(weight, self.index)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.vector = nn.Parameter(self.before.to(wide, copy=True))
        self.frozen: Frozen | None = None
        self.stale = False
        self.written = self.vector._version

    @property
    def key(self) -> str:
        """The name over all components."""
        return f"{self.component}.{self.name}"

    @property
    def delta(self) -> Tensor:
        """The differences [k] so far, in the vector's precision."""
        return self.vector.detach() - self.before.to(self.vector.dtype)

    def values(self) -> Tensor:
        """Return what the weight is set to: W0 plus the difference, in the order in which a file is loaded.

        So a saved and loaded model is the trained one to the bit.
        """
        return self.before.to(self.vector.dtype) + self.delta

    def gather(self, weight: Tensor) -> None:
        """Take the gradient of the trained entries out of the dense one, which goes."""
        grad = weight.grad
        if grad is None:
            return
        if self.index.device != grad.device:
            raise ValueError(
                f"{self.key} has moved to {grad.device} since SaRA was built: move the model first"
            )
        part = local(grad).reshape(-1).index_select(0, self.index).to(self.vector.dtype)
        weight.grad, self.stale = None, True
        if self.vector.grad is None:
            self.vector.grad = part
        else:
            self.vector.grad.add_(part)

    def write(self) -> None:
        """Bring what has been learnt into the weight."""
        if len(self.index):
            write_at(self.weight, self.index, self.values())
        self.written, self.stale = self.vector._version, False

    @property
    def behind(self) -> bool:
        """Whether the weight may lack what the vector has learnt."""
        return self.stale or self.vector._version != self.written

    def restore(self) -> None:
        """Give the weight its first values back, to the bit; the vector keeps what it learnt."""
        if len(self.index):
            write_at(self.weight, self.index, self.before)
        if self.frozen is not None:
            write_at(self.weight, self.frozen.index, self.frozen.before)

    def write_frozen(self) -> None:
        """Bring the entries that have stopped into the weight again, after `restore`."""
        if self.frozen is not None:
            write_at(
                self.weight, self.frozen.index, self.frozen.before.to(self.frozen.delta) + self.frozen.delta
            )

    @torch.no_grad()
    def keep(self, live: Tensor) -> None:
        """Let only the entries at these places (int64) go on learning; the others stay as they are."""
        rest = torch.ones(len(self.index), dtype=torch.bool, device=self.index.device)
        rest[live] = False
        parts = (self.index[rest].cpu(), self.before[rest].cpu(), self.delta[rest].cpu())
        old = self.frozen
        self.frozen = (
            Frozen(*parts)
            if old is None
            else Frozen(*(torch.cat(p) for p in zip((old.index, old.before, old.delta), parts, strict=True)))
        )
        self.index, self.before = self.index[live], self.before[live]
        self.vector.data = self.vector.data[live]
        self.vector.grad = None
        self.written = self.vector._version

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions, originals and differences of all entries, learning and frozen, by position."""
        index, before, delta = self.index.cpu(), self.before.cpu(), self.delta.cpu()
        if self.frozen is not None:
            index = torch.cat([index, self.frozen.index])
            before = torch.cat([before, self.frozen.before])
            delta = torch.cat([delta, self.frozen.delta])
        index, order = index.sort()
        return index, before[order], delta[order]
