"""Searched solvers that come with the package: schedules, DC-Solver's ratios, and a polynomial of those.

They lie in `shipped/NAME/`: `solver-*.json` are schedules of any kind, `ratios-*.json` are DC-Solver's, and
`polynomial.json` is fitted to those. Files say for which weights they were made.
"""

from __future__ import annotations

from pathlib import Path

from diffplug.registry import unknown
from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial
from diffplug.samplers.schedule.book import book_to_config as book_to_config
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


def shipped_schedules(name: str, steps: int | None = None) -> list[SolverSchedule]:
    """Return the best searched schedules of a model, by steps; with `steps` those for so many, maybe none.

    Raises ValueError where no schedule is there at all.
    """
    return _loaded(name, "solver-*.json" if steps is None else f"solver-{steps}.json")


def shipped_ratios(name: str, steps: int | None = None) -> list[SolverSchedule]:
    """Return DC-Solver with the ratios searched for a model; steps and errors as in `shipped_schedules`."""
    return _loaded(name, "ratios-*.json" if steps is None else f"ratios-{steps}-*.json")


def shipped_polynomial(name: str) -> CompensationPolynomial | None:
    """The polynomial fitted to those ratios, None if there is none."""
    path = shipped_folder(name) / "polynomial.json"
    return CompensationPolynomial.load(path) if path.exists() else None


def _loaded(name: str, pattern: str) -> list[SolverSchedule]:
    folder = shipped_folder(name)
    if not list(folder.glob(f"{pattern.split('-')[0]}-*.json")):
        raise ValueError(f"no {pattern} comes with diffplug for {name!r}: search your own (diffplug search)")
    return [SolverSchedule.load(path) for path in sorted(folder.glob(pattern))]
