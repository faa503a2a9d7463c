"""A studio on a tiny pipeline, for tests."""

from __future__ import annotations

from typing import Any

from diffplug.demos.studio.form import Choices
from diffplug.demos.studio.studio import Made, Studio

CHOICES = Choices(
    "tiny",
    ["the model's own", "ddim", "euler-a", "dpm++"],
    ["none", "fk", "best-of-n"],
    ["jpeg", "colour"],
    {"one": {"sampler": "ddim", "steps": 2}, "other": {"sampler": "euler-a", "steps": 2}},
)


def studio(copies: int = 1, **options: Any) -> Studio:
    """Return a studio on a tiny Stable Diffusion."""
    from diffplug.testing import tiny

    return Studio(tiny("sd15"), CHOICES, copies=copies, **options)


def made(one: Studio, **values: Any) -> list[Made]:
    """Return the pictures of a form."""
    form = one.read({"prompt": "x", "steps": 2, **values})
    return [event for event in one.make(form) if isinstance(event, Made)]


def data(one: Made) -> list[bytes]:
    """Return the pixels of what was made."""
    return [image.tobytes() for image in one.images]
