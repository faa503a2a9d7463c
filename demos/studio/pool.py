"""Pipelines for several users at once: copies that share the weights, each with one request at a time.

The work of a request runs in a thread of its own from its first step to its last, whatever threads the page
asks from; a request that is given up stops at its next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Queue, SimpleQueue
from time import monotonic
from typing import Any

from diffplug.demos.studio.limits import SECONDS
from diffplug.network.siblings import sibling

__all__ = ["Control", "Pool", "Stopped"]


class Stopped(Exception):
    """A request was given up, or took too long."""


class Control:
    """What the work of a request talks through: `give` hands on an event, `step` ends it when it should."""

    def __init__(self, seconds: float) -> None:
        self.news: SimpleQueue[Any] = SimpleQueue()
        self.stop = threading.Event()
        self.until = monotonic() + seconds
        self.seconds = seconds

    def give(self, event: Any) -> None:
        """Hand an event to whoever waits."""
        self.news.put(event)

    def step(self) -> None:
        """Raise Stopped where the request was given up, and TimeoutError where its time is over."""
        if self.stop.is_set():
            raise Stopped
        if monotonic() > self.until:
            raise TimeoutError(f"stopped after {self.seconds:.0f} s, the most that a request may take")


class Pool:
    """As many pipelines as requests may run at once. copies: how many."""

    def __init__(self, pipe: Any, copies: int = 1, *, seconds: float = SECONDS) -> None:
        self.seconds, self.copies = seconds, copies
        self._free: Queue[Any] = Queue()
        for number in range(copies):
            self._free.put(pipe if number == 0 else sibling(pipe))

    @property
    def free(self) -> int:
        """Return how many pipelines wait for work."""
        return self._free.qsize()

    def run(self, work: Callable[[Any, Control], None]) -> Iterator[Any]:
        """Yield what `work(pipe, control)` gives; a reader that goes away stops it at its next step.

        Raises what the work raises, and TimeoutError where no pipeline gets free in time.
        """
        try:
            pipe = self._free.get(timeout=self.seconds)
        except Empty:
            raise TimeoutError(f"no pipeline got free within {self.seconds:.0f} s: try again later") from None
        control, over = Control(self.seconds), object()

        def go() -> None:
            try:
                work(pipe, control)
                last: Any = over
            except BaseException as error:
                last = error.with_traceback(None) if isinstance(error, Stopped) else error
            self._free.put(pipe)
            control.give(last)

        threading.Thread(target=go, name="request", daemon=True).start()
        try:
            while (event := control.news.get()) is not over:
                if isinstance(event, Stopped):
                    return
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            control.stop.set()
