"""A button that ends a run, and whose word stays."""

from __future__ import annotations

from time import sleep
from typing import Any

__all__ = ["stops"]

ON_THEIR_WAY = 0.3
"""Seconds within which the answers of an ended run that were sent already arrive."""


def stops(button: Any, started: Any, note: Any, *, says: str = "stopped", name: str) -> None:
    """Let a button end what `started` began, and say so in `note` after everything that was on its way.

    Said at once only, the words would be written over by the last step, which the browser may get after them.
    """

    def said() -> str:
        sleep(ON_THEIR_WAY)
        return says

    button.click(lambda: "stopping", None, note, cancels=[started], api_name=name, queue=False).then(
        said, None, note, api_visibility="private", queue=False, show_progress="hidden"
    )
