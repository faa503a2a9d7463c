"""PNG files that know how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffplug.files import atomic_path, safe_join

__all__ = ["read_settings", "save_picture", "save_png"]

_KEY = "diffplug"


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes `image` to `path` whole or not at all; `settings` go into the file as a JSON text."""
    info = PngInfo()
    if settings:
        info.add_text(_KEY, json.dumps(dict(settings), allow_nan=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_picture(image: Image.Image, folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    """The new file, named by the seed that made it; an older picture of that seed keeps its name."""
    path = safe_join(folder, f"seed-{seed:06d}.png")
    number = 1
    while path.exists():
        number += 1
        path = safe_join(folder, f"seed-{seed:06d}-{number}.png")
    save_png(image, path, {**settings, "seed": seed})
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` wrote into a file; empty where there are none. ValueError if damaged."""
    try:
        with Image.open(path) as image:
            text = image.text.get(_KEY, "") if hasattr(image, "text") else ""
        return json.loads(text) if text else {}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{str(path)!r} is no readable PNG with settings: {error}") from error
