"""The text that A1111's family of programs writes into pictures: from settings, and back to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["from_parameters_text", "parameters_text"]

_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_SAMPLERS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "deis": "deis",
    "dpm++ 2m": "dpm++",
    "dpm++ 2m karras": "dpm++",
    "dpm++ 2m sde": "dpm++-sde",
    "euler": "euler",
    "euler a": "euler-a",
    "heun": "heun",
    "lcm": "lcm",
    "lms": "lms",
    "plms": "pndm",
    "tcd": "tcd",
    "unipc": "unipc",
}
"""Names that those programs give to samplers, and ours."""


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Return prompt, negative prompt, and a line "Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 0, ..."."""
    used = settings.get("used", {})
    width, height = settings.get("width", used.get("width")), settings.get("height", used.get("height"))
    facts = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("sampler", used.get("scheduler")),
        "CFG scale": settings.get("guidance", used.get("guidance")),
        "Seed": settings.get("seed"),
        "Size": f"{width}x{height}" if width and height else None,
        "Model": settings.get("model"),
        "Eta": settings.get("eta"),
        "Steerer": settings.get("steer"),
        "Particles": settings.get("particles"),
        "Reward": settings.get("reward"),
        "Version": f"diffplug {used['versions']['diffplug']}" if "versions" in used else None,
    }
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in facts.items() if value is not None))
    return "\n".join(lines)


def from_parameters_text(text: str) -> dict[str, Any]:
    """Return the settings that such a text tells: prompt, steps, sampler, guidance, seed, size and so on.

    What this package does not know (hires passes, networks, ...) is left out. Raises ValueError where the
    text is none of that kind.
    """
    lines = text.strip().splitlines()
    facts = dict(_PAIR.findall(lines[-1])) if lines else {}
    if "Steps" not in facts:
        raise ValueError("the text has no line 'Steps: ..., Sampler: ...'")
    body = "\n".join(lines[:-1])
    prompt, marked, negative = body.partition("Negative prompt:")
    found: dict[str, Any] = {"prompt": prompt.strip()}
    if marked and negative.strip():
        found["negative_prompt"] = negative.strip()
    for name, key, kind in (("Steps", "steps", int), ("Seed", "seed", int), ("CFG scale", "guidance", float)):
        if name in facts:
            found[key] = _number(kind, name, facts[name])
    if (sampler := _SAMPLERS.get(facts.get("Sampler", "").strip().lower())) is not None:
        found["sampler"] = sampler
    if size := re.fullmatch(r"(\d+)x(\d+)", facts.get("Size", "").strip()):
        found["width"], found["height"] = int(size[1]), int(size[2])
    return found


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text.strip())
    except ValueError as error:
        raise ValueError(f"{name} is {text.strip()[:80]!r}: a number is expected") from error


def _quoted(value: Any) -> str:
    """Return a value as those programs write it: in quotes where it has a comma, a colon or a line end."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if not set(text) & set(',:\n"'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'
