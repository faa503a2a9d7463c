"""SD.Next's list of distilled models, read as rows: {"name": {"path": "owner/repo", "extras": "steps: 8,
..."}}.

SD.Next keeps the settings of a model in one line, "sampler: Default, cfg_scale: 1.0, steps: 8". The list is
maintained, so a person can point `FewStep(..., catalogue="reference-distilled.json")` at it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffplug.samplers.few_step.catalogue import ANY, Row, Weights

_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler a": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ddim": ("ListedDDIMScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "euler flowmatch": ("FlowMatchEulerDiscreteScheduler", {}),
}
_KNOWN = ("sampler", "cfg_scale", "steps", "width", "height")


def is_sd_next(document: Mapping[str, Any]) -> bool:
    """Whether a JSON object is such a list: named objects, each with a path."""
    values = list(document.values())
    return bool(values) and all(isinstance(value, Mapping) and "path" in value for value in values)


def sd_next_rows(document: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return a row for each entry that says how many steps it takes; the others are left out.

    Their family is "any": the list does not tell it. A `cfg_scale` up to 1 is guidance off. Raises ValueError
    with the entry for extras that are not "key: value" pairs, and for numbers that are none.
    """
    found = [_row(name, entry) for name, entry in document.items()]
    return tuple(row for row in found if row is not None)


def read_extras(text: str) -> dict[str, str]:
    """Return the pairs of "sampler: Default, cfg_scale: 1.0, steps: 8"; ValueError for anything else."""
    pairs: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, colon, value = (side.strip() for side in part.partition(":"))
        if not colon or not value:
            raise ValueError(f"extras {text!r}: {part!r} is no 'key: value'")
        pairs[key.lower()] = value
    return pairs


def _row(name: str, entry: Mapping[str, Any]) -> Row | None:
    extras = read_extras(str(entry.get("extras") or ""))
    if "steps" not in extras:
        return None
    scheduler, options = _SAMPLERS.get(extras.get("sampler", "default").lower(), ("", {}))
    scale = _number(name, "cfg_scale", extras.get("cfg_scale", "1.0"))
    unread = [key for key in extras if key not in _KNOWN]
    if not scheduler and extras.get("sampler", "default").lower() not in _SAMPLERS:
        unread.append(f"sampler {extras['sampler']}")
    note = f" Not read: {', '.join(unread)}." if unread else ""
    repo, _, revision = str(entry["path"]).partition("@")
    return Row(
        name=_plain_name(name),
        family=ANY,
        kind="pipeline",
        weights=(Weights(repo=repo, revision=revision),),
        steps=(int(_number(name, "steps", extras["steps"])),),
        scheduler=scheduler,
        scheduler_options=options,
        guidance="cfg" if scale > 1 else "off",
        guidance_scale=scale if scale > 1 else None,
        negative_prompt=scale > 1,
        licence=str(entry.get("license") or "unknown"),
        source="SD.Next data/reference-distilled.json",
        verified=False,
        doubt=f"read from SD.Next's list, not from a card.{note}",
        notes=str(entry.get("desc") or ""),
    )


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "unnamed"


def _number(name: str, key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"SD.Next's entry {name!r}: {key} is {text!r}, not a number") from error
