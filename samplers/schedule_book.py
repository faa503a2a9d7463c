"""Several schedules, one for each number of evaluations, as a scheduler's configuration keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffplug.samplers.schedule import SolverSchedule


def book_to_config(schedules: Any) -> dict[str, Any] | None:
    """{"5": JSON of the schedule with 5 evaluations, ...}; None for none.

    schedules: a `SolverSchedule` or its JSON, a list of them, or such a dictionary. Raises ValueError for two
    of one number, and for what is no schedule.
    """
    if schedules is None:
        return None
    if isinstance(schedules, SolverSchedule) or (isinstance(schedules, Mapping) and "format" in schedules):
        schedules = [schedules]
    book: dict[str, Any] = {}
    for each in schedules.values() if isinstance(schedules, Mapping) else schedules:
        schedule = each if isinstance(each, SolverSchedule) else SolverSchedule.from_json(each)
        if str(schedule.nfe) in book:
            raise ValueError(f"two schedules have {schedule.nfe} evaluations: give one for each number")
        book[str(schedule.nfe)] = schedule.to_json()
    if not book:
        raise ValueError("schedules is empty: give at least one, or None")
    return book


def entry(book: Mapping[str, Any], steps: int) -> SolverSchedule:
    """The schedule for so many evaluations; ValueError where there is none."""
    if str(steps) not in book:
        known = ", ".join(sorted(book, key=int))
        raise ValueError(
            f"schedules are for {known} steps, the pipeline asked for {steps}: run one of those, search one "
            f"for {steps} steps, or name a preset for all others (solver='unipc')"
        )
    return SolverSchedule.from_json(book[str(steps)])
