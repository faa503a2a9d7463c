"""The k smallest scores of a whole model, exactly, without sorting a billion of them.

The bits of a float32, mapped so that they rise with the value, are read as a 32-bit number. One pass counts
the upper 16 bits of all scores and finds where rank k lies; a second one counts the lower 16 bits there. Of
equal scores those of earlier tensors and positions are taken, so the choice is the same everywhere: in
bfloat16 many weights are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.sara.targets import local
from diffplug.training.tuners.sara.distributed import Shards
from diffplug.training.tuners.sara.scores import Score

__all__ = ["Choice", "choose", "choose_per_layer", "parse_budget"]

_CHUNK = 1 << 20  # scores that are looked at at once
_HALF = 1 << 16


@dataclass(frozen=True)
class Choice:
    """index: int32 positions by name, of this process's part. threshold: score below which (or at which) a
    weight was chosen. count: of all processes; total: of all weights that could have been chosen."""

    index: dict[str, Tensor]
    threshold: float
    count: int
    total: int

    @property
    def density(self) -> float:
        """The share that was chosen."""
        return self.count / self.total


def choose(
    weights: Mapping[str, Tensor],
    score: Score,
    *,
    count: int | None = None,
    threshold: float | None = None,
    shards: Shards | None = None,
) -> Choice:
    """Return the `count` weights of smallest score, or those of a score strictly below `threshold`."""
    shards = shards or Shards.of(weights.values())
    total = sum(value.numel() for value in weights.values())
    if threshold is not None:
        index = {name: _below(score, name, value, threshold) for name, value in weights.items()}
        found = int(shards.sum(torch.tensor(sum(len(each) for each in index.values()))))
        return Choice(index, threshold, found, total)
    assert count is not None  # noqa: S101 - an order of our own calls
    key, quota = _kth(weights, score, count, shards)
    index = _taken(weights, score, key, quota, shards)
    return Choice(index, _score_of_key(key), count, total)


def choose_per_layer(
    weights: Mapping[str, Tensor], score: Score, density: float, *, shards: Shards | None = None
) -> tuple[Choice, dict[str, float]]:
    """Return the smallest int(density * numel) of each tensor, and each one's own threshold."""
    shards = shards or Shards.of(weights.values())
    counts = {name: int(value.numel() * density) for name, value in weights.items()}
    parts = {
        name: choose({name: weights[name]}, score, count=k, shards=shards) for name, k in counts.items() if k
    }
    empty = torch.empty(0, dtype=torch.int32)
    index = {name: parts[name].index[name] if name in parts else empty for name in weights}
    thresholds = {name: part.threshold for name, part in parts.items()}
    total = sum(value.numel() for value in weights.values())
    top = max(thresholds.values(), default=0.0)
    return Choice(index, top, sum(counts.values()), total), thresholds


def parse_budget(budget: int | str) -> int:
    """Return a number of weights: 50_000_000, or "50M", "200k"; ValueError for anything else."""
    text = str(budget).strip().lower().replace("_", "")
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:], 1)
    try:
        value = round(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ValueError(f"budget is {budget!r}: give a number of weights, such as 5000000 or '50M'")
    return value


def _keys(score: Score, name: str, weight: Tensor) -> Iterator[Tensor]:
    """Yield the scores of this process's part, a chunk at a time, as rising 32-bit numbers in int64."""
    own = local(weight.detach())
    scores = score(name, own)
    if scores.shape != own.shape:
        raise ValueError(
            f"the score of {name} has the shape {tuple(scores.shape)}, its weights {tuple(own.shape)}"
        )
    for part in scores.detach().reshape(-1).split(_CHUNK):
        if bool(part.isnan().any()):
            raise ValueError(f"{name} holds NaN: the model is broken, load it anew")
        bits = part.float().view(torch.int32).long()
        yield torch.where(bits >= 0, bits + 2**31, 2**31 - 1 - (bits & 0x7FFFFFFF))


def _score_of_key(key: int) -> float:
    bits = key - 2**31 if key >= 2**31 else -(2**31) + (2**31 - 1 - key)
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _kth(weights: Mapping[str, Tensor], score: Score, count: int, shards: Shards) -> tuple[int, int]:
    """Return the key of rank `count`, and how many weights of that very key belong to the chosen ones."""
    upper = torch.zeros(_HALF, dtype=torch.long)
    for name, value in weights.items():
        for keys in _keys(score, name, value):
            upper += torch.bincount(keys >> 16, minlength=_HALF).cpu()
    high, rest = _rank(shards.sum(upper), count)
    lower = torch.zeros(_HALF, dtype=torch.long)
    for name, value in weights.items():
        for keys in _keys(score, name, value):
            inside = keys[keys >> 16 == high]
            lower += torch.bincount(inside & (_HALF - 1), minlength=_HALF).cpu()
    low, quota = _rank(shards.sum(lower), rest)
    return (high << 16) + low, quota


def _rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds a rank (from 1), and the rank within it."""
    sums = counts.cumsum(0)
    at = int(torch.searchsorted(sums, rank))
    return at, rank - int(sums[at] - counts[at])


def _taken(
    weights: Mapping[str, Tensor], score: Score, key: int, quota: int, shards: Shards
) -> dict[str, Tensor]:
    """Return the positions below a key, and of that key itself as many as the quota allows."""
    places = {name: _places(score, name, value, key) for name, value in weights.items()}
    ties = torch.tensor([len(equal) for _, equal in places.values()], dtype=torch.long)
    quotas = shards.quotas(ties, quota)
    return {
        name: torch.cat([below, equal[:own]]).sort().values.int()
        for (name, (below, equal)), own in zip(places.items(), quotas, strict=True)
    }


def _places(score: Score, name: str, weight: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Return the positions of smaller keys, and of equal ones."""
    below, equal, start = [], [], 0
    for keys in _keys(score, name, weight):
        below.append(torch.nonzero(keys < key)[:, 0] + start)
        equal.append(torch.nonzero(keys == key)[:, 0] + start)
        start += len(keys)
    none = torch.empty(0, dtype=torch.long, device=local(weight.detach()).device)
    return torch.cat([none, *below]), torch.cat([none, *equal])


def _below(score: Score, name: str, weight: Tensor, threshold: float) -> Tensor:
    scores = score(name, local(weight.detach())).reshape(-1)
    return torch.nonzero(scores < threshold)[:, 0].int()
