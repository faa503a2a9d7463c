"""The settings in a picture, by the names of the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffplug.making.png import read_settings, read_texts
from diffplug.recipe.parameters_text import from_parameters_text

__all__ = ["RECIPE", "STEERING", "settings_of_picture"]

RECIPE = ("sampler", "steps", "guidance", "negative_prompt", "eta", "width", "height")
STEERING = ("particles", "reward", "strength")


def settings_of_picture(path: Path) -> dict[str, Any]:
    """Return a picture's settings by the names of the command's options, ours or A1111's.

    Raises ValueError for a picture without any.
    """
    texts = read_texts(path)
    if "diffplug" in texts:
        found = read_settings(path)
    elif "parameters" in texts:
        found = from_parameters_text(texts["parameters"])
    else:
        raise ValueError(
            f"{str(path)!r} has no settings in it: it was not made by diffplug, or was saved anew"
        )
    names = {
        "prompt",
        "model",
        "dtype",
        "seed",
        "steer",
        "options",
        "call",
        "vae_tiling",
        *RECIPE,
        *STEERING,
    }
    return {key: value for key, value in found.items() if key in names}
