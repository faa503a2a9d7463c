"""Checkpoints of the published code (arXiv 2409.06633), read with the base that they were trained on.

Such a file is a pickle {"threshold": t, 0: values, 1: values, ...}: trained values, not differences, in the
order of `parameters()`, and no positions: those are of |w| < t in the base as it was trained (float32).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from diffplug.sara.delta import Delta, SparseDelta, print_places
from diffplug.sara.targets import plain_name

__all__ = ["read_published"]


@torch.no_grad()
def read_published(base: nn.Module, path: str | os.PathLike[str], component: str = "unet") -> SparseDelta:
    """Return a published checkpoint as a delta on `base`, the float32 module that it was trained from.

    Only tensors are read (weights_only). Raises ValueError for a file that is no such checkpoint, a base in
    another precision, and counts that do not agree with |w| < threshold, tensor by tensor.
    """
    values, threshold = _read(Path(path))
    parameters = [(plain_name(name), value) for name, value in base.named_parameters()]
    deltas: dict[str, Delta] = {}
    for place, (name, weight) in enumerate(parameters):
        if weight.dtype != torch.float32:
            raise ValueError(
                f"the base is in {str(weight.dtype).removeprefix('torch.')}: load it in float32, since "
                "rounding changes which weights lie below the threshold"
            )
        index = torch.nonzero(weight.reshape(-1).abs() < threshold)[:, 0]
        found = values.get(place)
        if (0 if found is None else found.numel()) != len(index):
            raise ValueError(
                f"{name} has {len(index)} weights below {threshold:g}, the checkpoint holds "
                f"{0 if found is None else found.numel()}: it was trained from another base"
            )
        if found is None or not len(index):
            continue
        before = weight.reshape(-1)[index].cpu()
        deltas[name] = Delta(
            tuple(weight.shape),
            index.cpu().int(),
            found.detach().float().reshape(-1) - before,
            before[print_places(len(index))],
        )
    if len(values) > len(parameters):
        raise ValueError(
            f"the checkpoint holds {len(values)} tensors, {type(base).__name__} has {len(parameters)}"
        )
    return SparseDelta({component: deltas}, {component: type(base).__name__}, {"threshold": threshold})


def _read(path: Path) -> tuple[dict[int, Tensor], float]:
    if not path.is_file():
        raise ValueError(f"there is no file {os.fspath(path)!r}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read with weights_only=True: is it damaged?"
        ) from error
    if not isinstance(found, dict) or "threshold" not in found:
        raise ValueError(f"{os.fspath(path)!r} is no published SaRA checkpoint: it has no 'threshold'")
    values = {
        key: value for key, value in found.items() if isinstance(key, int) and isinstance(value, Tensor)
    }
    return values, float(found["threshold"])
