"""Frames as one animated picture (GIF, WebP or PNG), which every browser shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffplug.files import atomic_path

__all__ = ["SUFFIXES", "save_animation"]

SUFFIXES = (".webp", ".gif", ".png")


def save_animation(
    frames: Iterable[Tensor | Path], path: str | Path, *, fps: float = 12.0, scale: int = 1
) -> Path:
    """Write frames [3, h, w] in [0, 1], or their files, as an animation and return its path.

    Frames are read one by one. fps: frames a second. scale: whole factor of enlargement. Raises ValueError
    for another suffix, no frames, and bad numbers.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{str(path)!r}: an animation ends in {', '.join(SUFFIXES)}")
    if not (0 < fps <= 100):
        raise ValueError(f"fps={fps}: it must be above 0 and at most 100")
    pictures = _pictures(frames, scale)
    first = next(pictures, None)
    if first is None:
        raise ValueError("there are no frames to show")
    known: dict[str, dict[str, Any]] = {".webp": {"quality": 90, "method": 4}, ".gif": {"optimize": True}}
    kind = known.get(target.suffix.lower(), {})
    with atomic_path(target) as temporary:
        first.save(
            temporary,
            format="WEBP" if target.suffix.lower() == ".webp" else target.suffix[1:].upper(),
            save_all=True,
            append_images=pictures,
            duration=round(1000 / fps),
            loop=0,
            **kind,
        )
    return target


def _pictures(frames: Iterable[Tensor | Path], scale: int) -> Iterator[Image.Image]:
    for frame in frames:
        if isinstance(frame, Tensor):
            picture = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())
        else:
            picture = Image.open(frame).convert("RGB")
        if scale > 1:
            picture = picture.resize(
                (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
            )
        yield picture
