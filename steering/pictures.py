"""A pipeline's output, whatever its form: its pictures as one tensor, and the same output with fewer rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.steering.ranks import Slots

_FIELDS = ("images", "frames", "videos")


def raw_pictures(output: Any) -> Any:
    """Return the pictures of a pipeline's output as it holds them. Raises ValueError where it has none."""
    if isinstance(output, tuple):
        return output[0]
    for name in _FIELDS:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise ValueError(
        f"{type(output).__name__} holds no {' or '.join(_FIELDS)}: this pipeline cannot be steered"
    )


def to_tensor(pictures: Any) -> Tensor:
    """Return pictures in [0, 1] as `[n, 3, h, w]` float32, clips as `[n, f, 3, h, w]`.

    From PIL images, arrays `[..., h, w, c]` or tensors `[..., c, h, w]`, and lists of such clips. Sequences
    of integer tokens `[n, l]` stay as they are.
    """
    if isinstance(pictures, Tensor) and not pictures.is_floating_point():
        return pictures.detach().to("cpu")
    if isinstance(pictures, Tensor):
        return _coloured(pictures.detach().to("cpu", torch.float32))
    if isinstance(pictures, (list, tuple)):
        if isinstance(pictures[0], (list, tuple, np.ndarray, Tensor)):
            return torch.stack([to_tensor(clip) for clip in pictures])
        pictures = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in pictures])
    return _coloured(torch.from_numpy(np.asarray(pictures, dtype=np.float32)).movedim(-1, -3))


def _coloured(images: Tensor) -> Tensor:
    """Return grey pictures with three equal channels, others as they are."""
    return images.repeat_interleave(3, dim=-3) if images.shape[-3] == 1 else images


def take(output: Any, rows: Sequence[int], total: int) -> Any:
    """Return the same kind of output with only these rows, in this order; what has no `total` rows stays."""
    return _changed(output, lambda value: _taken(value, rows, total))


def of_all(output: Any, total: int, slots: Slots) -> Any:
    """Return the same kind of output with the rows of all processes, from one with this process's `total`."""
    if slots.ranks.count == 1:
        return output
    return _changed(output, lambda value: _of_all(value, total, slots))


def _changed(output: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(output, tuple):
        return tuple(change(value) for value in output)
    return type(output)(**{entry.name: change(getattr(output, entry.name)) for entry in fields(output)})


def joined(first: Any, second: Any, total: int) -> Any:
    """Return one output with the rows of two of the same kind; what has no `total` rows is the first's."""
    if isinstance(first, tuple):
        return tuple(_joined(a, b, total) for a, b in zip(first, second, strict=True))
    names = [entry.name for entry in fields(first)]
    return type(first)(**{n: _joined(getattr(first, n), getattr(second, n), total) for n in names})


def _joined(first: Any, second: Any, total: int) -> Any:
    if isinstance(first, Tensor) and first.ndim and len(first) == total:
        return torch.cat([first, second])
    if isinstance(first, np.ndarray) and first.ndim and len(first) == total:
        return np.concatenate([first, second])
    if isinstance(first, list) and len(first) == total:
        return first + second
    return first


def _of_all(value: Any, total: int, slots: Slots) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == total:
        return slots.all(value)
    if isinstance(value, np.ndarray) and value.ndim and len(value) == total:
        return slots.all(torch.from_numpy(value)).numpy()
    if isinstance(value, list) and len(value) == total:
        return slots.all_items(value)
    return value


def _taken(value: Any, rows: Sequence[int], total: int) -> Any:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == total:
        return value[list(rows)]
    if isinstance(value, list) and len(value) == total:
        return [value[row] for row in rows]
    return value


def best_first(rewards: Tensor, populations: int = 1) -> list[int]:
    """Return slots by falling reward `[k]`, the best one of each population before all others."""
    order = torch.argsort(rewards, descending=True, stable=True).tolist()
    size = len(order) // populations
    met: set[int] = set()
    leaders = [slot for slot in order if not (slot // size in met or met.add(slot // size))]  # type: ignore[func-returns-value]
    leaders = [slot for slot in leaders if rewards[slot] > -torch.inf]
    return leaders + [slot for slot in order if slot not in leaders]


def score_pictures(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str], *, takes_video: bool
) -> Tensor:
    """Return `[n]` scores; a clip gets the mean over its frames unless the reward takes clips.

    All rows at once; when memory runs out, half as many at a time, down to one.
    """
    if images.ndim != 5 or takes_video:
        return _in_portions(score, images, prompts)
    clips, frames = images.shape[:2]
    repeated = [prompt for prompt in prompts for _ in range(frames)]
    return _in_portions(score, images.flatten(0, 1), repeated).reshape(clips, frames).mean(-1)


def _in_portions(score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> Tensor:
    done: list[Tensor] = []
    start, size = 0, len(images)
    while start < len(images):
        try:
            done.append(score(images[start : start + size], prompts[start : start + size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            continue
        start += size
    return done[0] if len(done) == 1 else torch.cat(done)
