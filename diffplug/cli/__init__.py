"""`diffplug ...`: the command line, the front door that may ask every wing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.cli.main import app as app

_HOMES = {
    "app": "diffplug.cli.main",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
