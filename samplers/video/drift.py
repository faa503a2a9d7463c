"""The report of a long video: how each clip looks beside the first, and how clips meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffplug.video.statistics import ClipStatistics, Join, distance, slope

__all__ = ["DriftReport"]

_SERIES = ("level", "contrast", "saturation", "sharpness", "motion")


@dataclass(frozen=True)
class DriftReport:
    """What a long video did over its clips.

    clips: statistics of each. joins: of each pair of neighbours. seconds: of each clip's call. rewards: of
    the candidates of each clip where one was selected. notes: what was switched on.
    """

    clips: tuple[ClipStatistics, ...] = ()
    joins: tuple[Join, ...] = ()
    seconds: tuple[float, ...] = ()
    rewards: tuple[tuple[float, ...], ...] = ()
    log_weight: float | None = None
    notes: tuple[str, ...] = field(default=())

    def series(self, name: str) -> list[float]:
        """Return a statistic clip by clip: level, contrast, saturation, sharpness or motion."""
        return [float(getattr(clip, name)) for clip in self.clips]

    def slope(self, name: str) -> tuple[float, float]:
        """Return a statistic's change a clip and its standard error; NaN for fewer than three clips."""
        return slope(self.series(name))

    @property
    def drift(self) -> float:
        """The colour distance of the last clip to the first; 0 for a single clip."""
        return distance(self.clips[-1], self.clips[0]) if self.clips else math.nan

    @property
    def runaway(self) -> tuple[str, ...]:
        """The statistics of colour that change steadily: by more than two standard errors, and 2 % in all."""
        return tuple(name for name in ("saturation", "contrast", "level") if self._runs(name))

    @property
    def stagnant(self) -> bool:
        """Whether motion falls steadily: perfect joins with less and less happening are no success."""
        return self._runs("motion") and self.slope("motion")[0] < 0

    def _runs(self, name: str) -> bool:
        change, error = self.slope(name)
        series = self.series(name)
        if math.isnan(change):
            return False
        return abs(change) > 2 * error and abs(change) * (len(series) - 1) > 0.02 * (abs(series[0]) + 1e-9)

    def __str__(self) -> str:
        lines = [f"{len(self.clips)} clips, {len(self.joins)} joins, drift {self.drift:.3f}"]
        for name in _SERIES if self.clips else ():
            values = self.series(name)
            change, error = self.slope(name)
            told = "" if math.isnan(change) else f", {change:+.2g} +- {error:.1g} a clip"
            lines.append(f"  {name:<11}{values[0]:.4g} -> {values[-1]:.4g}{told}")
        if self.joins:
            seams = sorted(join.seam for join in self.joins)
            jumps = sorted(join.jump for join in self.joins)
            lines.append(f"  seam       worst {seams[0]:.1f} dB (higher is better)")
            lines.append(f"  jump       worst {jumps[-1]:.2f} steps (1 is smooth)")
        lines += [f"  runaway    {name} changes steadily" for name in self.runaway]
        lines += ["  stagnation motion falls steadily"] if self.stagnant else []
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def as_mapping(self) -> dict[str, Any]:
        """Return the report, ready for JSON; infinite numbers become None."""
        return {
            "clips": [_finite(clip.as_mapping()) for clip in self.clips],
            "joins": [_finite(vars(join)) for join in self.joins],
            "seconds": list(self.seconds),
            "rewards": [list(row) for row in self.rewards],
            "log_weight": self.log_weight,
            "notes": list(self.notes),
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DriftReport:
        """Return what `as_mapping` was called on."""
        clips = [{**clip, "motion": _number(clip["motion"], math.nan)} for clip in values["clips"]]
        joins = [
            Join(join["frame"], _number(join["seam"], math.inf), _number(join["jump"], math.nan))
            for join in values["joins"]
        ]
        return cls(
            clips=tuple(map(ClipStatistics.from_mapping, clips)),
            joins=tuple(joins),
            seconds=tuple(values["seconds"]),
            rewards=tuple(map(tuple, values["rewards"])),
            log_weight=values["log_weight"],
            notes=tuple(values["notes"]),
        )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    bad = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in bad else value for key, value in values.items()}


def _number(value: float | None, missing: float) -> float:
    return missing if value is None else value
