"""What the sheets of this folder share: cells that are graded, and a picture written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffplug.demos.contact_sheet import Cell
from diffplug.files import atomic_path
from diffplug.shapes import grade


def graded(images: Sequence[Image.Image], prompts: Sequence[str]) -> Cell:
    """Pictures of these prompts, marked by whether every fact holds."""
    return Cell(images, [bool(good) for good in grade(images, prompts).strict])


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet, and print where it is."""
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    print(path)
