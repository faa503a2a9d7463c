"""The search over whole solver schedules: Optuna proposes, fresh pairs judge, least squares polish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from diffplug.registry import unknown
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.comparison import Contest
from diffplug.samplers.search.loss import Loss, loss_of
from diffplug.samplers.search.metric import FORGIVING, WORST, LatentError, Metric, check_metric
from diffplug.samplers.search.preset_schedules import SEED_GRIDS, preset_schedules
from diffplug.samplers.search.problem import Problem, errors
from diffplug.samplers.search.refine import refine
from diffplug.samplers.search.s3 import distributions
from diffplug.samplers.search.space import ScheduleSpace
from diffplug.samplers.search.study import (
    METHODS,
    asked,
    check_study,
    complete,
    open_study,
    quiet,
    spent,
    study_sampler,
)

__all__ = ["Progress", "ScheduleSearch", "search_space"]

FINALISTS = 5
BATCH = 20  # schedules between two lessons of the predictor
REFINED = "refined"  # the study's attribute with what the refinement has reached
TIMED = 3  # schedules after which the time of all is guessed
Progress = Callable[[float, float], None]
"""Told what was spent so far, in schedules run on all pairs, and the best value."""


@dataclass(frozen=True)
class ScheduleSearch:
    """What a search found.

    schedule: the winner. validation, test: its figures on pairs that were not searched on, and on pairs that
    nothing was chosen by (None where there are none). baseline: the best preset on the validation pairs, with
    its name and figures; baseline_test: on the test pairs. trials: schedules that were evaluated, by the
    search and by the refinement. finalists: (value on the searched pairs, value on the validation pairs).
    history: (spent, best value) after each of them. study: Optuna's own record.
    """

    schedule: SolverSchedule
    metric: str
    validation: dict[str, float]
    test: dict[str, float] | None
    baseline: tuple[str, dict[str, float]]
    baseline_test: dict[str, float] | None
    trials: int
    spent: float
    finalists: tuple[tuple[float, float], ...]
    history: tuple[tuple[float, float], ...]
    study: Any = field(repr=False)

    @property
    def improved(self) -> bool:
        """Whether the winner is better than every preset on the validation pairs."""
        return self.validation["value"] < self.baseline[1]["value"]

    @property
    def gap(self) -> float:
        """The winner's value on the validation pairs less the best finalist's on those searched on."""
        return self.validation["value"] - min(train for train, _ in self.finalists)


def search_space(
    train: Problem,
    validation: Problem,
    space: ScheduleSpace,
    *,
    test: Problem | None = None,
    trials: float | None = 400,
    seconds: float | None = None,
    method: str = "s3",
    metric: Metric | None = None,
    refinement: int = 0,
    prune: bool = True,
    grids: Sequence[str] = SEED_GRIDS,
    seeds: Sequence[SolverSchedule] = (),
    seed: int = 0,
    storage: Any = None,
    study_name: str | None = None,
    told: Mapping[str, Any] | None = None,
    on_trial: Progress | None = None,
) -> ScheduleSearch:
    """The best schedule of a space that a budget of evaluated schedules finds (arXiv 2312.07243, and more).

    Presets come first. The five best, the five best presets and the seeds are scored again on the validation
    pairs, and the winner's numbers are refined (`refine`), kept only where the validation pairs agree.

    Args:
        trials: schedules run on all pairs, those of an interrupted search included; one that is given up
        early counts by the pairs it has seen. seconds: instead, or besides: the time of this process.
        method: out of `METHODS`. metric: by default the latent error. refinement: runs for the refinement,
        beyond `trials`; 0 for none. prune: give up what a paired test finds worse than the fifth best.
        grids: presets on these come first, eight on each. seeds: more schedules to begin with. storage: a
        file or a storage of Optuna, to resume and to share between processes. told: what is searched, to
        refuse studies of something else.

    Raises ValueError for unknown names, budgets too small for the presets and one batch, metrics that give
    no numbers or grow with quality, and studies of something else.
    """
    metric = metric or LatentError()
    if method not in METHODS:
        raise unknown("search method", method, list(METHODS))
    presets = preset_schedules(space, grids)
    if not presets:
        raise ValueError(
            f"none of the grids {', '.join(grids) or '(none given)'} exists for {space.evaluations} "
            "evaluations of this model: a search begins with presets on one or more of them"
        )
    _check_budget(trials, seconds, refinement, len(presets) + len(seeds))
    told = {
        "evaluations": space.evaluations,
        "metric": metric.name,
        "pairs": len(train.prompts),
        **(told or {}),
    }
    name = study_name or f"{space.evaluations} evaluations"
    with quiet():
        check_study(storage, name, told)
        check_metric(metric, train, train.final(presets[next(iter(presets))]))
        contest = Contest(train, metric, prune=prune)
        study = open_study(storage, name, told)
        run = _Run(study, space, contest, method, seed, trials, seconds, on_trial)
        run.presets(presets, seeds)
        run.search(len(presets) + len(seeds))
        return _judged(run, validation, test, presets, seeds, refinement)


@dataclass
class _Run:
    """One process's part of a search."""

    study: Any
    space: ScheduleSpace
    contest: Contest
    method: str
    seed: int
    trials: float | None
    seconds: float | None
    on_trial: Progress | None
    began: float = field(default_factory=perf_counter)
    scored: int = 0

    def presets(self, presets: Mapping[str, SolverSchedule], seeds: Sequence[SolverSchedule]) -> None:
        """Enqueue what comes first, where it is not there yet, and find the ceiling of the metric."""
        named = [*presets.items(), *((f"seed {i}", each) for i, each in enumerate(seeds))]
        values = {name: self.space.values(schedule) for name, schedule in named}
        ceiling = self.contest.metric.ceiling
        if ceiling is not None:
            if "limit" not in self.study.user_attrs:
                found = [self.contest.score(self.space.schedule(values[name])).error for name in presets]
                self.study.set_user_attr("limit", ceiling * min(found))
            self.contest.limit = float(self.study.user_attrs["limit"])
        wanted = {dimension.name for dimension in self.space.dimensions}
        there = {self.space.schedule(each) for each in asked(self.study) if wanted <= set(each)}
        for name, each in values.items():
            schedule = self.space.schedule(each)
            if schedule not in there:
                self.study.enqueue_trial(each, user_attrs={"preset": name})
                there.add(schedule)

    def search(self, first: int) -> None:
        """Ask, score and tell until the budget is used; first: how many schedules were enqueued."""
        self.study.sampler = study_sampler("random", self.space, self.seed)
        ready = False
        done = spent(self.study)
        while self._left(done):
            if not ready and not self._waiting():
                best = complete(self.study)
                values = best[0].params if best else None
                self.study.sampler = study_sampler(self.method, self.space, self.seed, values)
                ready = True
            self._one(complete(self.study) if ready else [])
            done = spent(self.study)
            if self.seconds is not None and self.scored == TIMED and self._waiting():
                self._check_time(first + BATCH)

    def _left(self, done: float) -> bool:
        in_time = self.seconds is None or perf_counter() - self.began < self.seconds or self.scored < TIMED
        return in_time and (self.trials is None or done < self.trials)

    def _waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _one(self, best: Sequence[FrozenTrial]) -> None:
        """One schedule asked for, scored and told. Interrupted, it counts as not asked."""
        trial = self.study.ask(distributions(self.space))
        bar = self.space.schedule(best[FINALISTS - 1].params) if len(best) >= FINALISTS else None
        try:
            found = self.contest.score(self.space.schedule(trial.params), bar)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.scored += 1
        n = len(self.contest.problem.truth)
        trial.set_user_attr("cost", found.pairs / n)
        trial.set_user_attr("error", found.error if np.isfinite(found.error) else WORST)
        if found.pairs == n:
            self.study.tell(trial, found.value)
        else:
            trial.report(found.value, found.pairs)
            self.study.tell(trial, state=TrialState.PRUNED)
        if self.on_trial is not None:
            top = complete(self.study)
            self.on_trial(spent(self.study), float(top[0].value) if top else WORST)

    def _check_time(self, stage: int) -> None:
        needed = (perf_counter() - self.began) / self.scored * stage
        if self.seconds is not None and needed > self.seconds:
            raise ValueError(
                f"seconds={self.seconds:g}: the presets and one batch are {stage} schedules, about "
                f"{needed:.0f} s here: give more time, or fewer pairs"
            )


def _judged(
    run: _Run,
    validation: Problem,
    test: Problem | None,
    presets: Mapping[str, SolverSchedule],
    seeds: Sequence[SolverSchedule],
    refinement: int,
) -> ScheduleSearch:
    """The result: finalists and presets on the validation pairs, the winner refined, and the test pairs.

    Seeds are there as they came: the space has no place for weights that were fitted to them.
    """
    metric, done = run.contest.metric, complete(run.study)
    known = [each.user_attrs["preset"] for each in done if each.user_attrs.get("preset") in presets]
    if not known:
        raise ValueError("no preset gave a finite value: the metric or the model gives NaN for all of them")
    judge = Contest(validation, metric, prune=False)
    best_known = min(known[:FINALISTS], key=lambda name: judge.score(presets[name]).value)
    if metric.ceiling is not None:
        judge.limit = metric.ceiling * min(judge.score(presets[name]).error for name in known[:FINALISTS])
    finalists = {run.space.schedule(each.params): float(each.value) for each in reversed(done)}
    five = list(finalists)[: -FINALISTS - 1 : -1]
    schedules = [*five, presets[best_known], *seeds]
    winner, used = min(schedules, key=lambda each: judge.score(each).value), 0
    if refinement:
        winner, used = _refined(run, judge, winner, refinement)
    tested = None if test is None else Contest(test, metric, prune=False)
    return ScheduleSearch(
        schedule=winner,
        metric=metric.name,
        validation=_figures(judge, winner),
        test=None if tested is None else _figures(tested, winner),
        baseline=(best_known, _figures(judge, presets[best_known])),
        baseline_test=None if tested is None else _figures(tested, presets[best_known]),
        trials=len(run.study.trials) + used,
        spent=spent(run.study) + used,
        finalists=tuple((finalists[each], judge.score(each).value) for each in five),
        history=_history(run.study),
        study=run.study,
    )


def _refined(run: _Run, judge: Contest, winner: SolverSchedule, runs: int) -> tuple[SolverSchedule, int]:
    """The winner refined, and the runs it took; an interrupted refinement is gone on with."""
    begin = json.loads(json.dumps(winner.to_json()))
    kept = run.study.user_attrs.get(REFINED) or {}
    start, before = winner, 0
    if kept.get("from") == begin:
        reached = SolverSchedule.from_json(kept["schedule"])
        if judge.score(reached).value <= judge.score(winner).value:  # on other pairs than then, perhaps
            start, before = reached, min(int(kept["runs"]), runs)
            if kept["of"] >= runs:
                return reached, before

    def keep(best: SolverSchedule, used: int, of: int = 0) -> None:
        told = {"from": begin, "schedule": best.to_json(), "runs": before + used, "of": of}
        run.study.set_user_attr(REFINED, told)

    best, used = refine(
        run.contest.problem,
        start,
        score=lambda each: judge.score(each).value,
        evaluations=runs - before,
        loss=_loss(run.contest),
        on_better=keep,
    )
    keep(best, used, runs)
    return best, before + used


def _loss(contest: Contest) -> Loss:
    """What least squares lower: errors of pairs that the metric forgives count by their logarithm."""
    problem, forgiving = contest.problem, getattr(contest.metric, "aggregate", None) in FORGIVING
    return loss_of("robust", problem) if forgiving and len(problem.truth) > 1 else problem.loss


def _figures(contest: Contest, schedule: SolverSchedule) -> dict[str, float]:
    """The metric's value of a schedule, and its latent errors."""
    off = errors(contest.problem, schedule)
    share = float((off.of_pairs > 0.1).mean())
    return {"value": contest.score(schedule).value, **off.told(), "above .1": share}


def _history(study: Any) -> tuple[tuple[float, float], ...]:
    """(spent, best value) after every trial."""
    found, cost, best = [], 0.0, WORST
    for each in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        cost += each.user_attrs.get("cost", 1.0)
        if each.state == TrialState.COMPLETE:
            best = min(best, float(each.value))
        found.append((cost, best))
    return tuple(found)


def _check_budget(trials: float | None, seconds: float | None, refinement: int, first: int) -> None:
    if trials is None and seconds is None:
        raise ValueError("no budget: give trials (schedules to run), seconds, or both")
    if trials is not None and trials < first + BATCH:
        raise ValueError(
            f"trials={trials:g}: the {first} presets come first and then a batch of {BATCH}, give at least "
            f"{first + BATCH}"
        )
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds:g}: give a positive time")
    if refinement < 0:
        raise ValueError(f"refinement={refinement}: give 0 for none, or the runs it may take")
