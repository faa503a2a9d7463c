"""What the stages of a search share: sets of pairs, who is told, and the best schedule that passes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.comparison import PairedComparison, amplification, blows_up
from diffplug.samplers.search.metric import LatentError
from diffplug.samplers.search.problem import Problem, errors
from diffplug.samplers.search.result import StageResult

__all__ = ["Callbacks", "Leader", "Problems", "figures"]

TRIES = 3  # schedules of a stage that are tried on more noises, from the best one on
LARGEST = 10.0
"""The amplification that a schedule may have, or that of the most amplifying preset if that is more."""


@dataclass(frozen=True)
class Problems:
    """Pairs that are searched on, that choose, that only judge, and noises on which nothing may blow up.

    prompts: a problem with every prompt to learn from, for the stage "gradient"; default: those searched on.
    """

    train: Problem
    validation: Problem
    test: Problem | None = None
    tail: Problem | None = None
    prompts: Problem | None = None


def _ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that are called as a search goes on.

    on_stage: with the name of what begins. on_result: with each `StageResult`. on_trial: with what the
    decisions have spent, and the best value. on_step: with the gradient's steps so far, the reward of its
    pictures and the best on validation pairs. on_evaluation: at each evaluation of the network.
    """

    on_stage: Callable[[str], None] = _ignore
    on_result: Callable[[StageResult], None] = _ignore
    on_trial: Callable[[float, float], None] = _ignore
    on_step: Callable[[int, float, float], None] = _ignore
    on_evaluation: Callable[[], None] | None = None


@dataclass
class Leader:
    """The best schedules on validation pairs out of those that a stage passes through.

    judge: scores on the validation pairs. tail: see `Problems`. limit: the largest amplification allowed.
    """

    judge: PairedComparison
    tail: Problem | None
    limit: float
    seen: list[SolverSchedule] = field(default_factory=list)
    """Each better than the one before it."""

    def watch(self, schedule: SolverSchedule) -> None:
        """Keep a schedule that is better than all before it and does not amplify too much."""
        if self.seen and self.judge.score(schedule).value >= self.judge.score(self.seen[-1]).value:
            return
        if self.allows(schedule):
            self.seen.append(schedule)

    def watch_all(self, schedules: Sequence[SolverSchedule]) -> None:
        """Watch one after another."""
        for schedule in schedules:
            self.watch(schedule)

    def allows(self, schedule: SolverSchedule) -> bool:
        """Whether a schedule does not amplify too much."""
        return (amplification(schedule, self.judge.problem.levels) or 0.0) <= self.limit

    def better_than(self, known: SolverSchedule, baseline: SolverSchedule) -> SolverSchedule | None:
        """Return the best one that is better than a known schedule and sound, None where there is none.

        Of latent errors neither mean nor 95th percentile may be larger than those of the baseline, and none
        of the noises of the tail may end where no sample of the baseline is.
        """
        for schedule in islice(reversed(self.seen), TRIES):
            if self.judge.score(schedule).value >= self.judge.score(known).value:
                return None
            if self._no_worse(schedule, baseline) and not (
                self.tail is not None and blows_up(self.tail, schedule, baseline)
            ):
                return schedule
        return None

    def _no_worse(self, schedule: SolverSchedule, baseline: SolverSchedule) -> bool:
        metric = self.judge.metric
        if not isinstance(metric, LatentError) or metric.aggregate != "mean":
            return True
        ours, theirs = (errors(self.judge.problem, each) for each in (schedule, baseline))
        return ours.mean <= theirs.mean and ours.p95 <= theirs.p95


def figures(judge: PairedComparison, schedule: SolverSchedule) -> dict[str, float]:
    """Return the metric's value of a schedule, and its latent errors."""
    off = errors(judge.problem, schedule)
    share = float((off.of_pairs > 0.1).mean())
    return {"value": judge.score(schedule).value, **off.figures(), "above .1": share}
