"""The settings in a picture, by the names of the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffplug.making.png import read_settings, read_texts
from diffplug.messages import shown
from diffplug.recipe.parameters_text import from_parameters_text

__all__ = ["RECIPE", "STEERING", "settings_of_picture"]

RECIPE = ("sampler", "steps", "guidance", "negative_prompt", "eta", "width", "height")
STEERING = ("particles", "reward", "strength")


def settings_of_picture(path: Path) -> dict[str, Any]:
    """Return a picture's settings by the names of the command's options, ours or A1111's.

    "used" has what acted where the settings leave it open, as the pipeline's own guidance. Raises ValueError
    for a picture without any, and for settings of another kind than diffplug writes.
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
    known = {key: value for key, value in found.items() if key in _KINDS and value is not None}
    for key, value in known.items():
        kinds, said = _KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(
                f"{str(path)!r}: its settings are damaged: {key} is {shown(value)}, and {said} is expected"
            )
    return known


_TEXT, _WHOLE, _NUMBER = (str, "a text"), (int, "a whole number"), ((int, float), "a number")
_TABLE = (dict, "an object")

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("prompt", "model", "dtype", "sampler", "negative_prompt", "steer", "reward"), _TEXT),
    **dict.fromkeys(("seed", "steps", "width", "height", "particles"), _WHOLE),
    **dict.fromkeys(("guidance", "eta", "strength"), _NUMBER),
    **dict.fromkeys(("options", "call", "used"), _TABLE),
    "vae_tiling": (bool, "true or false"),
}
"""What a picture may say, of which kind, and that kind in words."""
