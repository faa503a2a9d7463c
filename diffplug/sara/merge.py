"""Several deltas as one: their weighted sum, or one of peft's ways of merging what contradicts itself.

Deltas that were trained on one base at one threshold have the same positions, so every entry collides. The
plain sum is the published way; TIES (arXiv 2306.01708) elects a sign for each entry, DARE (arXiv 2311.03099)
drops entries at random and enlarges the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffplug.registry import unknown
from diffplug.sara.delta import Delta, SparseDelta
from diffplug.sara.file import load_delta

__all__ = ["METHODS", "merge_sara"]

_DENSITY = 0.5
METHODS = ("sum", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def merge_sara(
    sources: Sequence[str | os.PathLike[str] | SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    method: str = "sum",
    density: float = _DENSITY,
    seed: int = 0,
) -> SparseDelta:
    """Return one delta made of several of the same base.

    weights: of the deltas, None for ones. method: "sum", or "ties", "dare_linear", "dare_ties",
    "magnitude_prune" by `peft.utils.merge_utils`. density: share of each delta's entries that these keep.
    seed: of what DARE drops. Raises ValueError for fewer than two deltas, other numbers of weights, an
    unknown method, a density outside (0, 1], and deltas of different bases.
    """
    if isinstance(sources, (str, os.PathLike)):
        raise ValueError(f"{os.fspath(sources)!r} is one file: give a list of two or more")
    deltas = [one if isinstance(one, SparseDelta) else load_delta(one) for one in sources]
    told = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(deltas) < 2 or len(told) != len(deltas):
        raise ValueError(
            f"{len(deltas)} deltas and {len(told)} weights: give two deltas or more, a weight each"
        )
    if method not in METHODS:
        raise unknown("way of merging", method, list(METHODS))
    if any(not math.isfinite(w) for w in told):
        raise ValueError(f"weights are {told}: give finite numbers")
    if method == "sum" and density != _DENSITY:
        raise ValueError(
            f"density={density} would do nothing with method='sum': leave it out, or take 'ties'"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    keys = sorted({(component, name) for one in deltas for component, name, _ in one.entries()})
    components: dict[str, dict[str, Delta]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, name in keys:
            parts = [one.components.get(component, {}).get(name) for one in deltas]
            merged = _merged(f"{component}.{name}", parts, told, method, density)
            components.setdefault(component, {})[name] = merged
    classes = {component: kind for one in deltas for component, kind in one.classes.items()}
    return SparseDelta(components, classes, {"merged": method, "weights": told})


def _merged(
    key: str, parts: Sequence[Delta | None], weights: Sequence[float], method: str, density: float
) -> Delta:
    """Return one tensor's deltas as one, on the union of their positions."""
    found = [part for part in parts if part is not None]
    if len({part.shape for part in found}) > 1:
        raise ValueError(f"{key} has different shapes in the deltas: they belong to different models")
    _check_prints(key, found)
    union = torch.cat([part.index for part in found]).unique()
    spread = []
    for part in parts:
        values = torch.zeros(len(union))
        if part is not None:
            values[torch.searchsorted(union, part.index)] = part.values.float()
        spread.append(values)
    same = [p.prints for p in found if p.prints is not None and torch.equal(p.index, union)]
    return Delta(
        found[0].shape, union, _combined(spread, weights, method, density), same[0] if same else None
    )


def _check_prints(key: str, parts: Sequence[Delta]) -> None:
    """Raise ValueError where deltas of the same positions were trained on different values."""
    first = parts[0]
    for other in parts[1:]:
        alike = (
            first.prints is not None and other.prints is not None and torch.equal(first.index, other.index)
        )
        if alike and not torch.allclose(first.prints, other.prints, rtol=0.01, atol=1e-7):  # type: ignore[arg-type]
            raise ValueError(
                f"the deltas were trained on different bases ({key} differs): they do not add up"
            )


def _combined(values: list[Tensor], weights: Sequence[float], method: str, density: float) -> Tensor:
    told = torch.tensor(list(weights))
    if method == "sum":
        return (torch.stack(values) * told[:, None]).sum(0)
    from peft.utils import merge_utils

    merge: Any = getattr(merge_utils, method)
    out: Tensor = merge(values, told, density)
    return out
