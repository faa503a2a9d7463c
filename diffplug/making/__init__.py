"""Pictures into folders: whole or absent, none made twice, each knowing how it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.making.folder import Finished as Finished
    from diffplug.making.folder import Folder as Folder
    from diffplug.making.folder import Row as Row
    from diffplug.making.folder import fingerprints as fingerprints
    from diffplug.making.folder import make as make
    from diffplug.making.folder import save_batch as save_batch
    from diffplug.making.folder import unmade as unmade
    from diffplug.making.folder import versions as versions

_HOMES = dict.fromkeys(
    ("Finished", "Folder", "Row", "fingerprints", "make", "save_batch", "unmade", "versions"),
    "diffplug.making.folder",
)

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
