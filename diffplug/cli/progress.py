"""Progress on the error stream: bars with steps on a terminal, a line a minute where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Advance", "progress"]

_EVERY = 60.0
"""Seconds between two lines where the error stream is no terminal."""


class Advance:
    """The progress of some tasks: call it `(task, n)`; `step(task, done, of)` tells the steps between."""

    def __init__(self, tasks: Sequence[tuple[str, int]], clock: Callable[[], float] = monotonic) -> None:
        self.tasks, self.clock = list(tasks), clock
        self.done = [0] * len(tasks)
        self.begun = clock()

    def __call__(self, task: int, n: int) -> None:
        self.done[task] += n

    def step(self, task: int, done: int, of: int) -> None:
        """Show that the present batch has taken so many of its steps."""


class _Silence(Advance):
    """Nothing is shown."""


class _Lines(Advance):
    """A line a minute."""

    def __init__(self, tasks: Sequence[tuple[str, int]], clock: Callable[[], float] = monotonic) -> None:
        super().__init__(tasks, clock)
        self.last, self.steps = self.begun, ""

    def __call__(self, task: int, n: int) -> None:
        super().__call__(task, n)
        self.steps = ""
        self._tell(task)

    def step(self, task: int, done: int, of: int) -> None:
        self.steps = f", step {done} of {of} of the next"
        self._tell(task)

    def _tell(self, task: int) -> None:
        now = self.clock()
        if now - self.last < _EVERY:
            return
        self.last = now
        name, total = self.tasks[task]
        done, minutes = self.done[task], (now - self.begun) / 60
        left = f", about {minutes * (total - done) / done:.0f} min left" if done else ""
        typer.echo(f"{name}: {done} of {total} after {minutes:.0f} min{self.steps}{left}", err=True)


class _Bars(Advance):
    """A bar for each task; its clock starts with its first step."""

    def __init__(self, tasks: Sequence[tuple[str, int]], bars: Progress) -> None:
        super().__init__(tasks)
        self.bars = bars
        self.ids: list[TaskID] = [bars.add_task(name, total=n, start=False, steps="") for name, n in tasks]
        if self.ids:
            bars.start_task(self.ids[0])

    def __call__(self, task: int, n: int) -> None:
        super().__call__(task, n)
        self.bars.start_task(self.ids[task])
        self.bars.update(self.ids[task], advance=n, steps="")
        after = task + 1
        if self.done[task] >= self.tasks[task][1] and after < len(self.ids):
            self.bars.start_task(self.ids[after])

    def step(self, task: int, done: int, of: int) -> None:
        self.bars.start_task(self.ids[task])
        self.bars.update(self.ids[task], steps=f"step {done}/{of}")


@contextmanager
def progress(tasks: Sequence[tuple[str, int]], *, disable: bool = False) -> Iterator[Advance]:
    """Yield an `Advance` for the named tasks and their totals, shown on the error stream."""
    console = Console(stderr=True)
    if disable or not console.is_terminal:
        yield _Silence(tasks) if disable else _Lines(tasks)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[steps]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        yield _Bars(tasks, bars)
