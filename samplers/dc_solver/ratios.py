"""Compensation ratios for several numbers of steps and guidance scales, from wherever they come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffplug.checks import is_finite
from diffplug.files import read_json
from diffplug.messages import shown
from diffplug.samplers.dc_solver.polynomial import FORMAT as POLYNOMIAL
from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial
from diffplug.samplers.fingerprint import made_for_guidance
from diffplug.samplers.library import shipped_names, shipped_polynomial, shipped_ratios
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import unipc
from diffplug.samplers.schedule.schedule import LARGEST_FILE, SolverSchedule
from diffplug.samplers.schedule.steps import checked_ratios

__all__ = ["RatioBook"]

Key = tuple[int, float | None]


@dataclass(frozen=True)
class RatioBook:
    """Ratios by (steps, guidance scale), guidance None for any; a polynomial for what is not listed.

    metas: what files say about where they come from.
    """

    entries: tuple[tuple[Key, tuple[float, ...]], ...] = ()
    polynomial: CompensationPolynomial | None = None
    metas: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, source: Any, order: int = 2) -> RatioBook:
        """A book of a list of ratios, a polynomial, schedules, {(steps, guidance): ratios}, a file or a name.

        order: K of the compensation, up to whose step ratios have to be 1. Raises ValueError for anything
        else, for bad ratios, two of one key, and schedules that decide more than DC-Solver's ratios.
        """
        if isinstance(source, RatioBook):
            return source
        if isinstance(source, (str, os.PathLike)):
            return cls._named(os.fspath(source), order)
        if isinstance(source, CompensationPolynomial):
            return cls(polynomial=source, metas=(source.meta,) if source.meta else ())
        if isinstance(source, SolverSchedule):
            return cls._of_schedules([source])
        if isinstance(source, Mapping):
            if "format" in source:
                return cls._of_schedules([SolverSchedule.from_json(source)])
            if not source:
                raise ValueError(
                    "DC ratios are an empty dictionary: give {(steps, guidance): ratios}, or None"
                )
            return cls(tuple(_entry(key, ratios, order) for key, ratios in source.items()))
        if isinstance(source, Sequence) and source and isinstance(source[0], SolverSchedule):
            return cls._of_schedules(source)
        ratios = checked_ratios(source, order)
        return cls() if ratios is None else cls((((len(ratios), None), tuple(ratios)),))

    @classmethod
    def shipped(cls, name: str, steps: int | None = None) -> RatioBook:
        """Return the book that comes with the package for a model; steps: only what serves so many."""
        found = cls._of_schedules(shipped_ratios(name, steps))
        return replace(found, polynomial=shipped_polynomial(name))

    @classmethod
    def _named(cls, name: str, order: int) -> RatioBook:
        if name in shipped_names():
            return cls.shipped(name)
        if Path(name).suffix == ".npy":
            return cls.of(CompensationPolynomial.load(name))
        document = read_json(name, limit=LARGEST_FILE)
        if isinstance(document, list):
            try:
                return cls.of(document, order)
            except ValueError as error:
                raise ValueError(f"{name!r} holds no compensation ratios: {error}") from error
        if isinstance(document, dict) and document.get("format") == POLYNOMIAL:
            return cls.of(CompensationPolynomial.load(name))
        return cls._of_schedules([SolverSchedule.load(name)])

    @classmethod
    def _of_schedules(cls, schedules: Iterable[SolverSchedule]) -> RatioBook:
        entries: dict[Key, tuple[float, ...]] = {}
        metas = []
        for schedule in schedules:
            key = (len(schedule.steps), made_for_guidance(schedule.meta))
            if not _only_ratios(schedule):
                raise ValueError(
                    f"the schedule for {key[0]} steps decides more than DC-Solver's ratios: use Solver(...)"
                )
            if key in entries:
                raise ValueError(f"two schedules are for {key[0]} steps at guidance {key[1]}: leave one out")
            entries[key] = schedule.ratios
            metas.append(dict(schedule.meta))
        return cls(tuple(entries.items()), metas=tuple(metas))

    def to_config(self, elsewhere: str) -> Any:
        """The book as plain JSON for a configuration: None without ratios, a list where there is only one.

        elsewhere: "refuse" or "neutral", for steps that it has no ratios for.
        """
        if not self.entries and self.polynomial is None:
            return None
        if self.single is not None and elsewhere == "refuse":
            return self.single
        entries = [[count, scale, list(ratios)] for (count, scale), ratios in self.entries]
        curve = None if self.polynomial is None else self.polynomial.to_json()
        return {"entries": entries, "polynomial": curve, "elsewhere": elsewhere}

    @classmethod
    def from_config(cls, document: Mapping[str, Any], order: int = 2) -> RatioBook:
        """The book that `to_config` told; ValueError for anything else."""
        if set(document) != {"entries", "polynomial", "elsewhere"}:
            raise ValueError(
                f"dc_ratios holds {shown(list(document))}: give one number per step, or what "
                "RatioBook.of(...).to_config('refuse') tells; DCSolver(...) takes files and dictionaries"
            )
        entries = tuple(_entry((count, scale), ratios, order) for count, scale, ratios in document["entries"])
        curve = document["polynomial"]
        return cls(entries, None if curve is None else CompensationPolynomial.from_json(curve))

    @property
    def single(self) -> list[float] | None:
        """The ratios of a book that has one list for any guidance, and nothing else."""
        if self.polynomial is not None or len(self.entries) != 1 or self.entries[0][0][1] is not None:
            return None
        return list(self.entries[0][1])

    def choose(self, steps: int, guidance: float | None) -> tuple[list[float], str]:
        """(ratios for a call, what is not exact about them, or "").

        A listed entry first, then the polynomial, then the nearest guidance of either. Raises ValueError
        where nothing is for so many steps.
        """
        known = {scale: ratios for (count, scale), ratios in self.entries if count == steps}
        for scale in (guidance, None):
            if scale in known:
                return list(known[scale]), ""
        curve = self.polynomial
        if curve is not None and guidance is not None and curve.covers(steps, guidance):
            return curve.ratios(steps, guidance), ""
        scales = [scale for scale in known if scale is not None]
        if guidance is not None and scales:
            near = min(scales, key=lambda scale: abs(scale - guidance))
            return list(
                known[near]
            ), f"DC ratios for {steps} steps are of guidance {near:g}, not {guidance:g}"
        if guidance is not None and curve is not None and curve.steps[0] <= steps <= curve.steps[1]:
            near = min(max(guidance, curve.guidance[0]), curve.guidance[1])
            note = f"DC ratios for {steps} steps are of guidance {near:g}, not {guidance:g}"
            return curve.ratios(steps, near), note
        if scales:
            note = f"DC ratios for {steps} steps are of guidance {scales[0]:g}, this pipeline does not tell"
            several = len(scales) > 1
            return list(known[scales[0]]), f"{note} its own: plug this very pipeline" if several else ""
        raise ValueError(
            f"DC ratios are for {self.steps()} steps, the pipeline asked for {steps}: run one of those, or "
            f"search ratios for {steps} (diffplug search)"
        )

    def steps(self) -> str:
        """The numbers of steps that there are ratios for, in words."""
        counts = {str(count) for (count, _), _ in self.entries}
        spans = [] if self.polynomial is None else ["{} to {}".format(*self.polynomial.steps)]
        return ", ".join([*sorted(counts, key=int), *spans]) or "no"


def _entry(key: Any, ratios: Any, order: int) -> tuple[Key, tuple[float, ...]]:
    """A checked entry of a dictionary {(steps, guidance): ratios} or {steps: ratios}."""
    steps, scale = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
    finite_scale = scale is None or is_finite(scale)
    if isinstance(steps, bool) or not isinstance(steps, int) or not finite_scale:
        raise ValueError(f"key {shown(key)} of the DC ratios: give (steps, guidance scale), as in (6, 7.5)")
    checked = checked_ratios(ratios, order) or []
    if len(checked) != steps:
        raise ValueError(f"{len(checked)} DC ratios for {steps} steps: give one for each step")
    return (steps, None if scale is None else float(scale)), tuple(checked)


def _only_ratios(schedule: SolverSchedule) -> bool:
    """Whether a schedule is the method's own recipe apart from its ratios."""
    if schedule.nodes.kind != "name" or schedule.compensation != (2, "timestep"):
        return False
    plain = _recipe(len(schedule.steps), schedule.nodes.final)
    more = (schedule.deltas, schedule.time_shift, schedule.skips, schedule.mean, schedule.statistics)
    return (schedule.nodes, schedule.first, *more) == (plain.nodes, plain.first, *[None] * 5) and all(
        (one.param, one.predict, one.correct) == (other.param, other.predict, other.correct)
        for one, other in zip(schedule.steps, plain.steps, strict=True)
    )


@cache
def _recipe(steps: int, final: str) -> SolverSchedule:
    """The method without ratios."""
    return unipc(steps, Nodes(kind="name", name="linspace", final=final), disable_corrector=(0,))
