"""What a search may be told, in groups: pairs, how the pipeline is run, the budget, and each stage's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from diffplug.messages import shown
from diffplug.registry import unknown

__all__ = ["BATCH", "Budget", "Decisions", "Gradient", "Pairs", "Runs", "Settings", "check_stages_act"]

SEED_GRIDS = ("linspace", "trailing", "karras", "log-snr", "beta57", "exponential")
BATCH = 20  # schedules between two lessons of the predictor
TAIL = 600  # an event of one in two hundred is missed by one such set in twenty


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How many pairs of prompt and noise there are.

    pairs: searched on. validation: choose between schedules, default twice as many. test: only judge, default
    as many as searched on. tail: more noises on which a schedule that is about to be kept must not blow up;
    needs no converged results, 0 for none. seed: of the first pair; the others count up.
    """

    pairs: int = 64
    validation: int | None = None
    test: int | None = None
    tail: int = TAIL
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count in zip(("pairs", "validation", "test"), self.counts, strict=True):
            if count < 1:
                raise ValueError(f"{name}={count}: give at least 1 pair of prompt and noise")
        if self.tail < 0:
            raise ValueError(f"tail={self.tail}: give 0 for none, or some hundreds of noises")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Pairs searched on, of validation, of test."""
        validation = 2 * self.pairs if self.validation is None else self.validation
        return self.pairs, validation, self.pairs if self.test is None else self.test


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How the pipeline is run.

    options: further keywords of its call. max_rows: prompts in one call. truth_steps: evaluations of the
    converged results. grid: whose ends are kept, a name of `grids.GRIDS`. cache: folder of converged results.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    max_rows: int = 64
    truth_steps: int = 200
    grid: str = "linspace"
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "truth_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend.

    trials: schedules that the decisions may run on all searched pairs. seconds: instead, or besides: the time
    of this process. refinement: runs that polish them, beyond `trials`. fits: runs of the stages of fits in
    all, None for as many as they take. prune: give up what a paired test finds worse than the fifth best.
    """

    trials: float | None = None
    seconds: float | None = None
    refinement: int = 0
    fits: float | None = None
    prune: bool = True

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds:g}: give a positive time")
        for name in ("trials", "fits"):
            if (runs := getattr(self, name)) is not None and not 0 <= runs < float("inf"):
                raise ValueError(f"{name}={runs:g}: give a number of runs, or None for as many as it takes")
        if self.refinement < 0:
            raise ValueError(f"refinement={self.refinement}: give 0 for none, or the runs it may take")

    def check_decisions(self, first: int) -> None:
        """Raise ValueError where the presets and one batch would not fit."""
        if self.trials is None and self.seconds is None:
            raise ValueError("no budget: give trials (schedules to run), seconds, or both")
        if self.trials is not None and self.trials < first + BATCH:
            raise ValueError(
                f"trials={self.trials:g}: the {first} presets come first and then a batch of {BATCH}, give "
                f"at least {first + BATCH}"
            )


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How the stage "decisions" searches (arXiv 2312.07243).

    method: "s3", or "evolution" without its predictor; a function (space, seed, best values or None) to a
    sampler of Optuna for others. grids: presets on these come first, eight on each. analytic: whether the
    first step may do without the network. statistics: file of the model's statistics, for steps that stand on
    them (DPM-Solver-v3); measured and written where it is not there yet.
    """

    method: Any = "s3"
    grids: Sequence[str] = SEED_GRIDS
    analytic: bool = False
    statistics: str | os.PathLike[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """How the stage "gradient" climbs: Adam on weights and told timesteps, see `Descent`.

    check_every: steps between two looks at the validation pairs. checkpoints: save memory, cost a third more
    time.
    """

    steps: int = 400
    batch: int = 16
    rate: float = 4e-3
    check_every: int = 25
    checkpoints: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if not (np.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate={self.rate}: give a positive learning rate, such as 0.004")


ACT_IN = {"decisions": "decisions", "gradient": "gradient"}
"""Groups of settings that act in one stage only, and that stage."""

GROUPS = {"pairs": Pairs, "runs": Runs, "budget": Budget, "decisions": Decisions, "gradient": Gradient}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a search's settings; `Settings.of(pairs=24, trials=90, ...)` sorts flat keywords into groups."""

    pairs: Pairs = Pairs()
    runs: Runs = Runs()
    budget: Budget = Budget()
    decisions: Decisions = Decisions()
    gradient: Gradient = Gradient()

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Return the settings of flat keywords; ValueError names the nearest one for an unknown one."""
        known = {each.name: name for name, group in GROUPS.items() for each in fields(group)}
        kinds = {each.name: str(each.type) for group in GROUPS.values() for each in fields(group)}
        sorted_: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        for name, value in given.items():
            if name not in known:
                raise unknown("setting of a search", name, list(known))
            _check_kind(name, value, kinds[name])
            sorted_[known[name]][name] = value
        return cls(**{name: group(**sorted_[name]) for name, group in GROUPS.items()})


def check_stages_act(given: Mapping[str, Any], stages: Sequence[str]) -> None:
    """Raise ValueError for a setting whose stage is not among these: it would do nothing."""
    for group, stage in ACT_IN.items():
        mine = [each.name for each in fields(GROUPS[group]) if each.name in given]
        if mine and stage not in stages:
            raise ValueError(
                f"{mine[0]}={shown(given[mine[0]])} acts only in the stage {stage!r}: name it among the "
                f"stages, or leave {mine[0]} out"
            )


def _check_kind(name: str, value: Any, kind: str) -> None:
    """Raise ValueError for a setting that is not the number, or True or False, of its field's annotation."""
    wanted, _, optional = kind.partition(" | ")
    types: dict[str, tuple[tuple[type, ...], str]] = {
        "int": ((Integral,), "a whole number"),
        "float": ((Real,), "a number"),
        "bool": ((bool, np.bool_), "True or False"),
    }
    if wanted not in types or (optional and value is None):
        return
    right, words = types[wanted]
    if not isinstance(value, right) or (isinstance(value, bool) and wanted != "bool"):
        raise ValueError(f"{name}={shown(value)}: give {words}")
