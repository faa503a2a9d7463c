"""How far a run of cells is, and when it will end: one line for every cell, for terminals and log files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from time import perf_counter
from typing import Any

from benchmarks.steering.pictures import Cell


class Clock:
    """Counts work in prompts times budget, and knows how many seconds of it each rule takes.

    say: what prints a line. A rule that was not timed yet counts as the mean of the others.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.left: dict[str, float] = {}
        self.spent: dict[str, list[float]] = {}
        self.cells = self.made = 0
        self._since = self._begun = perf_counter()
        self._sizes: dict[Cell, int] = {}

    def start(self, cells: Sequence[tuple[Cell, int]]) -> None:
        """Begin with these cells and their numbers of prompts."""
        self._sizes = dict(cells)
        self.cells, self.made = len(cells), 0
        self._since = self._begun = perf_counter()
        for cell, size in cells:
            self.left[cell.rule] = self.left.get(cell.rule, 0.0) + size * cell.budget
        self.say(f"{self.cells} cells to make, {sum(self.left.values()):.0f} pictures' worth of evaluations")

    def finished(self, cell: Cell) -> None:
        """A cell is done: say how far the run is."""
        now = perf_counter()
        work = self._sizes[cell] * cell.budget
        total = self.spent.setdefault(cell.rule, [0.0, 0.0])
        total[0] += now - self._since
        total[1] += work
        self.left[cell.rule] -= work
        self._since = now
        self.made += 1
        self.say(f"{self.made}/{self.cells} {cell.rule} x{cell.budget}: {self.forecast()}")

    def remaining(self) -> float:
        """The seconds that what is left will take."""
        rate = {rule: seconds / work for rule, (seconds, work) in self.spent.items()}
        mean = sum(rate.values()) / len(rate)
        return sum(work * rate.get(rule, mean) for rule, work in self.left.items())

    def forecast(self) -> str:
        """Time gone, time left and the hour of the end."""
        left = self.remaining()
        end: Any = datetime.now() + timedelta(seconds=left)
        gone = timedelta(seconds=round(perf_counter() - self._begun))
        return f"{gone} gone, {timedelta(seconds=round(left))} left, done at {end:%H:%M}"
