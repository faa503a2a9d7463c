"""Who is to blame when a reward fails: one particle, or the reward itself; and rewards that take too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RewardTimeout(Exception):
    """A reward did not answer in time."""


def limited(ask: Callable[..., Tensor], seconds: float) -> Callable[..., Tensor]:
    """Return `ask` with a limit of time. Raises RewardTimeout; the work itself is left behind in its thread.

    The thread has the caller's gradient mode, and does not keep the interpreter alive.
    """

    def asked(*arguments: Any) -> Tensor:
        found: list[Tensor] = []
        failed: list[BaseException] = []
        graded = torch.is_grad_enabled()

        def work() -> None:
            try:
                with torch.set_grad_enabled(graded):
                    found.append(ask(*arguments))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True, name="diffplug-reward")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise RewardTimeout(f"it gave no answer within {seconds:g} s: raise the timeout, or leave it out")
        if failed:
            raise failed[0]
        return found[0]

    return asked


_NOBODY = (
    ConnectionError,
    FileNotFoundError,
    TimeoutError,
    RewardTimeout,
    SystemExit,
    torch.OutOfMemoryError,
)  # of the scorer, not of a picture


def failing_row(ask: Callable[[slice], Any], rows: int, error: BaseException) -> int | None:
    """Return the row whose picture makes a reward raise, None where no single one does.

    Halves the rows, so that a slow reward is asked about 2 log2(n) times; the row that is found must fail
    once more by itself with the same kind of error, and another one must not. Errors of the scorer itself
    (files, connections, time) are not looked into.
    """
    if isinstance(error, _NOBODY) or rows < 1:
        return None

    def fails(part: slice) -> bool:
        try:
            ask(part)
        except Exception as again:
            return type(again) is type(error)
        return False

    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(slice(low, middle)) else (middle, high)
    other = slice(rows - 1, rows) if low == 0 else slice(0, 1)
    blamed = fails(slice(low, low + 1)) and (rows == 1 or not fails(other))
    return low if blamed else None
