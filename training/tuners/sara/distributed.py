"""SaRA on several processes: copies of the model (gradients averaged here), or shards of it (FSDP2).

The model is not wrapped by DistributedDataParallel, which would keep all dense gradients alive: k numbers are
averaged in one message right before the step. Under FSDP2 (`fully_shard`) every process selects and trains
its own rows; histograms are added up, so the selection is that of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Shards", "average_gradients", "check_same", "copies", "gathered", "refuse_wrapped"]


@dataclass(frozen=True)
class Shards:
    """How a model's tensors lie over processes: whole on each (group None), or by rows over a group."""

    group: Any = None

    @classmethod
    def of(cls, weights: Iterable[Tensor]) -> Shards:
        """Return how these tensors lie; ValueError for layouts other than rows over one axis of processes."""
        found: list[Any] = [value for value in weights if hasattr(value, "device_mesh")]
        if not found:
            return cls()
        mesh: Any = found[0].device_mesh
        for value in found:
            placements: Any = value.placements
            if value.device_mesh != mesh or mesh.ndim != 1 or not placements[0].is_shard(0):
                raise ValueError(
                    "SaRA works with fully_shard over one axis of processes and rows: build the mesh so"
                )
        return cls(mesh.get_group())

    def sum(self, value: Tensor) -> Tensor:
        """Return a tensor added up over the processes."""
        if self.group is None:
            return value
        out = value.to(_device(self.group))
        torch.distributed.all_reduce(out, group=self.group)
        return out.cpu()

    def quotas(self, ties: Tensor, quota: int) -> list[int]:
        """Return how many of its own ties, a number a tensor, this process may take.

        Ties are taken in the order of tensors, then of positions, which rise with the process.
        """
        if self.group is None:
            parts, own = [ties], 0
        else:
            size, own = torch.distributed.get_world_size(self.group), torch.distributed.get_rank(self.group)
            sent = ties.to(_device(self.group))
            parts = [torch.empty_like(sent) for _ in range(size)]
            torch.distributed.all_gather(parts, sent, group=self.group)
            parts = [part.cpu() for part in parts]
        flat = torch.stack(parts, 1).reshape(-1)  # tensor after tensor, in each process after process
        before = (flat.cumsum(0) - flat).view(len(ties), len(parts))[:, own]
        return [max(0, min(int(mine), quota - int(b))) for mine, b in zip(ties, before, strict=True)]

    def first_row(self, weight: Tensor) -> int:
        """Return the number of rows that lie on processes before this one."""
        if self.group is None:
            return 0
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        placements: Any = weight.placements  # type: ignore[attr-defined]
        _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        return int(offset[0])


def _device(group: Any) -> torch.device:
    return torch.device("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")


def copies() -> int:
    """Return the number of processes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


@torch.no_grad()
def average_gradients(vectors: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of vectors by their means over all processes, in one message.

    A vector without a gradient counts as 0, unless no process has one for it.
    """
    flat = [torch.zeros_like(v) if v.grad is None else v.grad for v in vectors]
    known = torch.tensor([float(v.grad is not None) for v in vectors]).to(flat[0])
    message = torch.cat([*(g.flatten().to(flat[0]) for g in flat), known])
    torch.distributed.all_reduce(message)
    *parts, known = message.split([*(v.numel() for v in vectors), len(vectors)])
    for vector, part, count in zip(vectors, parts, known.tolist(), strict=True):
        vector.grad = (part / copies()).to(vector.dtype) if count else None


def check_same(count: int) -> None:
    """Raise ValueError where processes have chosen different numbers of weights: their models differ."""
    if copies() == 1:
        return
    counts: list[Any] = [None] * copies()
    torch.distributed.all_gather_object(counts, count)
    if len(set(counts)) > 1:
        raise ValueError(f"the processes chose {counts} weights: load the same model on all of them")


def gathered(index: Tensor, values: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Return positions and values of all processes, in order, on the CPU."""
    if shards.group is None:
        return index.cpu(), values.cpu()
    parts: list[Any] = [None] * torch.distributed.get_world_size(shards.group)
    torch.distributed.all_gather_object(parts, (index.cpu(), values.cpu()), group=shards.group)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def refuse_wrapped(module: nn.Module) -> None:
    """Raise ValueError for modules in wrappers that hold dense gradients or flat parameters."""
    kind = type(module).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        raise ValueError(
            f"the model is wrapped by {kind}, which keeps all dense gradients: give SaRA the bare model (it "
            "averages gradients itself), or shard it by fully_shard"
        )
