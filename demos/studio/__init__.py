"""What the page does, without the page: forms, limits, pipelines for several users, kept pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.demos.studio.form import Choices as Choices
    from diffplug.demos.studio.form import Form as Form
    from diffplug.demos.studio.pool import Pool as Pool
    from diffplug.demos.studio.studio import Studio as Studio
    from diffplug.demos.studio.votes import Votes as Votes

_HOMES = {
    "Choices": "diffplug.demos.studio.form",
    "Form": "diffplug.demos.studio.form",
    "Pool": "diffplug.demos.studio.pool",
    "Studio": "diffplug.demos.studio.studio",
    "Votes": "diffplug.demos.studio.votes",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
