"""Searched solvers that come with the package: schedules, DC-Solver's ratios, and a polynomial of those.

They lie in `shipped/NAME/`: `solver-*.json` are schedules of any kind, `ratios-*.json` are DC-Solver's, and
`polynomial.json` is fitted to those. Files say for which weights they were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffplug.registry import unknown
from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial
from diffplug.samplers.schedule.schedule import SolverSchedule

__all__ = ["shipped_folder", "shipped_names", "shipped_polynomial", "shipped_ratios", "shipped_schedules"]

FOLDER = Path(__file__).parent / "shipped"
NAMES = ("shapes",)


def shipped_names() -> list[str]:
    """Models that searched solvers may come with."""
    return list(NAMES)


def shipped_folder(name: str) -> Path:
    """The folder of a model's searched solvers inside the installed package; it may be missing or empty.

    Raises ValueError, with the nearest names, for a model that has none.
    """
    if name not in NAMES:
        raise unknown("shipped solver", name, shipped_names(), "Or give the path of a .json file.")
    return FOLDER / name


def shipped_schedules(name: str) -> list[SolverSchedule]:
    """The best searched schedules of a model, by steps; ValueError where none is there."""
    return _loaded(name, "solver-*.json")


def shipped_ratios(name: str) -> list[SolverSchedule]:
    """DC-Solver with the ratios searched for a model, by steps and guidance; ValueError if there are none."""
    return _loaded(name, "ratios-*.json")


def shipped_polynomial(name: str) -> CompensationPolynomial | None:
    """The polynomial fitted to those ratios, None if there is none."""
    path = shipped_folder(name) / "polynomial.json"
    return CompensationPolynomial.load(path) if path.exists() else None


def _loaded(name: str, pattern: str) -> list[SolverSchedule]:
    found = [SolverSchedule.load(path) for path in sorted(shipped_folder(name).glob(pattern))]
    if not found:
        raise ValueError(f"no {pattern} comes with diffplug for {name!r}: search your own (diffplug search)")
    return found


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
