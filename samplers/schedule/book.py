"""Several schedules as one value: for each number of evaluations, and for guidance scales among those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffplug.samplers.fingerprint import made_for_guidance
from diffplug.samplers.schedule.schedule import SolverSchedule

__all__ = ["ScheduleBook", "book_to_config"]


@dataclass(frozen=True)
class ScheduleBook:
    """Schedules, of which every run takes the one for its steps and its guidance.

    Raises ValueError for two of one number of evaluations and one guidance.
    """

    schedules: tuple[SolverSchedule, ...] = ()

    def __post_init__(self) -> None:
        keys = [(each.nfe, made_for_guidance(each.meta)) for each in self.schedules]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two schedules are for {key[0]} steps at guidance {key[1]}: leave one out")

    @classmethod
    def of(cls, schedules: Any) -> ScheduleBook:
        """The book of a schedule or its JSON, of a list of them, or of what `to_config` gave."""
        if schedules is None:
            return cls()
        if isinstance(schedules, ScheduleBook):
            return schedules
        if isinstance(schedules, SolverSchedule) or (
            isinstance(schedules, Mapping) and "format" in schedules
        ):
            schedules = [schedules]
        listed = list(schedules.values() if isinstance(schedules, Mapping) else schedules)
        if not listed:
            raise ValueError("schedules is empty: give at least one, or None")
        return cls(
            tuple(
                each if isinstance(each, SolverSchedule) else SolverSchedule.from_json(each)
                for each in listed
            )
        )

    def __bool__(self) -> bool:
        return bool(self.schedules)

    def to_config(self) -> dict[str, Any] | None:
        """{"5": JSON of the schedule with 5 evaluations, ...}, with "5 at 7.5" where guidance matters."""
        counts = [each.nfe for each in self.schedules]
        config = {_key(each, counts.count(each.nfe) > 1): each.to_json() for each in self.schedules}
        return config or None

    def counts(self) -> str:
        """The numbers of evaluations that there are schedules for, in words."""
        return ", ".join(str(count) for count in sorted({each.nfe for each in self.schedules}))

    def find(self, steps: int, guidance: float | None = None) -> SolverSchedule | None:
        """The schedule with so many evaluations, of the nearest guidance; None where there is none.

        guidance: of the run, None where nobody knows it: then the first.
        """
        found = self._of(steps)
        return min(found, key=lambda each: _distance(each, guidance), default=None)

    def entry(self, steps: int, guidance: float | None = None) -> SolverSchedule:
        """That schedule; ValueError where there is none."""
        found = self.find(steps, guidance)
        if found is None:
            raise ValueError(
                f"schedules are for {self.counts()} steps, the pipeline asked for {steps}: run one of those, "
                f"search one for {steps} steps, or name a preset for all others (solver='unipc')"
            )
        return found

    def note(self, steps: int, guidance: float | None) -> str:
        """What is not exact about the schedule that a run gets, or ""."""
        found = self.find(steps, guidance)
        made_for = None if found is None else made_for_guidance(found.meta)
        if made_for is None:
            return ""
        if guidance is not None:
            return (
                ""
                if made_for == guidance
                else (
                    f"the schedule for {steps} steps was made at guidance {made_for:g}, the pipeline runs at "
                    f"{guidance:g}"
                )
            )
        if len(self._of(steps)) == 1:
            return ""
        scales = ", ".join(f"{made_for_guidance(each.meta) or 0:g}" for each in self._of(steps))
        return (
            f"schedules for {steps} steps are of guidance {scales}, and this pipeline does not tell its own: "
            f"that of {made_for:g} is used; plug this very pipeline"
        )

    def _of(self, steps: int) -> Sequence[SolverSchedule]:
        return [each for each in self.schedules if each.nfe == steps]


def book_to_config(schedules: Any) -> dict[str, Any] | None:
    """The schedules as JSON for a scheduler's configuration (see `ScheduleBook.to_config`); None for none."""
    return ScheduleBook.of(schedules).to_config()


def _key(schedule: SolverSchedule, several: bool) -> str:
    made_for = made_for_guidance(schedule.meta)
    return f"{schedule.nfe} at {made_for:g}" if several and made_for is not None else str(schedule.nfe)


def _distance(schedule: SolverSchedule, guidance: float | None) -> float:
    made_for = made_for_guidance(schedule.meta)
    return 0.0 if guidance is None or made_for is None else abs(made_for - guidance)
