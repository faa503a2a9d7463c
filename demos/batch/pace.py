"""How fast a batch goes, and how long it will take: pictures a second over the last half minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

__all__ = ["Pace"]

_WINDOW = 30.0


class Pace:
    """Counts pictures; use it as the `tell` of a driver.

    total: pictures to make. clock: seconds, for tests.
    """

    def __init__(self, total: int, clock: Callable[[], float] = monotonic) -> None:
        self.total, self.clock = total, clock
        self.made = self.failed = self.found = 0
        self.steps = ""
        self.begun = clock()
        self._events: deque[tuple[float, int]] = deque()

    def __call__(self, kind: str, n: int, of: int) -> None:
        """Learn that n pictures were made, failed, or were found; or that n steps `of` a call are done."""
        if kind == "step":
            self.steps = f"step {n}/{of}"
            return
        self.made += n if kind == "made" else 0
        self.failed += n if kind == "failed" else 0
        self.found += n if kind == "found" else 0
        if kind == "made":
            self._events.append((self.clock(), n))

    @property
    def done(self) -> int:
        """Return how many pictures need no more work."""
        return self.made + self.failed + self.found

    @property
    def speed(self) -> float:
        """Return pictures a second of late; 0 before the first."""
        now = self.clock()
        while self._events and now - self._events[0][0] > _WINDOW:
            self._events.popleft()
        span = min(_WINDOW, max(now - self.begun, 1e-9))
        return sum(n for _, n in self._events) / span

    @property
    def left(self) -> float | None:
        """Return seconds to the end at the present speed; None where it cannot be told."""
        return (self.total - self.done) / self.speed if self.speed > 0 else None

    def line(self) -> str:
        """Return it all in words."""
        parts = [f"{self.done:,} of {self.total:,} pictures"]
        if self.speed > 0:
            parts.append(f"{self.speed:.2g} a second")
        if self.left is not None:
            parts.append(f"{_clock(self.left)} left")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    """Return a time as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
