"""The stage "decisions": Optuna proposes whole solver schedules, pairs score them, fits polish the winner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.comparison import PairedComparison
from diffplug.samplers.search.decisions.evolution import distributions
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.decisions.starts import preset_schedules
from diffplug.samplers.search.decisions.study import (
    asked,
    bury,
    check_method,
    complete,
    quiet,
    sign,
    spent,
    study_sampler,
)
from diffplug.samplers.search.fits import refine
from diffplug.samplers.search.leader import Leader
from diffplug.samplers.search.metric import WORST
from diffplug.samplers.search.result import Record
from diffplug.samplers.search.settings import BATCH, Settings

__all__ = ["FINALISTS", "DecisionSearch", "check_decisions"]

FINALISTS = 5
REFINED = "refined"  # the record's entry with what the refinement has reached
TIMED = 3  # schedules after which the time of all is guessed


def check_decisions(
    space: ScheduleSpace, settings: Settings, seeds: Sequence[Any]
) -> dict[str, SolverSchedule]:
    """Return the presets that come first; ValueError for unknown names and for budgets too small for them."""
    check_method(settings.decisions.method)
    grids = settings.decisions.grids
    presets = preset_schedules(space, grids)
    if not presets:
        raise ValueError(
            f"none of the grids {', '.join(grids) or '(none given)'} exists for {space.evaluations} "
            "evaluations of this model: a search begins with presets on one or more of them"
        )
    settings.budget.check_decisions(len(presets) + len(seeds))
    return presets


@dataclass
class DecisionSearch:
    """One process's part of a search over a space of schedules (arXiv 2312.07243, and more).

    scores: on the searched pairs. presets and seeds come first, in `first`; on_trial: see `Callbacks`.
    """

    study: Any
    space: ScheduleSpace
    scores: PairedComparison
    settings: Settings
    presets: Mapping[str, SolverSchedule]
    seeds: Sequence[SolverSchedule]
    on_trial: Any
    began: float = field(default_factory=perf_counter)
    scored: int = 0

    def run(self) -> None:
        """Run presets, then what the sampler proposes, until the budget is used."""
        with quiet():
            bury(self.study)
            self._enqueue()
            self._search()
        if not self.known_presets():
            raise ValueError(
                "no preset gave a finite value: the metric or the model gives NaN for all of them"
            )

    def known_presets(self) -> dict[str, SolverSchedule]:
        """Return the best presets on the searched pairs, best first, by name."""
        names = [each.user_attrs.get("preset") for each in complete(self.study)]
        return {name: self.presets[name] for name in [n for n in names if n in self.presets][:FINALISTS]}

    def finalists(self) -> dict[SolverSchedule, float]:
        """Return the best schedules on the searched pairs, best first, with their values."""
        found = {self.space.schedule(t.params): float(t.value) for t in reversed(complete(self.study))}
        return dict(list(found.items())[: -FINALISTS - 1 : -1])

    def refine(self, winner: SolverSchedule, leader: Leader, record: Record) -> int:
        """Show the leader what fits make of a winner; return the runs. An interrupted one is continued."""
        judge, runs = leader.judge, self.settings.budget.refinement
        begin = json.loads(json.dumps(winner.to_json()))
        kept = record.read(REFINED) or {}
        start, before = winner, 0
        if kept.get("from") == begin:
            reached = SolverSchedule.from_json(kept["schedule"])
            if judge.score(reached).value <= judge.score(winner).value:  # on other pairs than then, perhaps
                leader.watch(reached)
                start, before = reached, min(int(kept["runs"]), runs)
                if kept["of"] >= runs:
                    return before

        def keep(best: SolverSchedule, used: int, of: int = 0) -> None:
            leader.watch(best)
            entry = {"from": begin, "schedule": best.to_json(), "runs": before + used, "of": of}
            record.write(REFINED, entry)

        def score(schedule: SolverSchedule) -> float:
            return judge.score(schedule).value if leader.allows(schedule) else WORST

        best, used = refine(
            self.scores.problem, start, score=score, evaluations=runs - before, on_better=keep
        )
        keep(best, used, runs)
        return before + used

    def history(self) -> tuple[tuple[float, float], ...]:
        """Return (spent, best value) after every trial."""
        found, cost, best = [], 0.0, WORST
        for each in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            cost += each.user_attrs.get("cost", 1.0)
            if each.state == TrialState.COMPLETE:
                best = min(best, float(each.value))
            found.append((cost, best))
        return tuple(found)

    def _enqueue(self) -> None:
        """Enqueue what comes first, where it is not there yet, and find the ceiling of the metric."""
        named = [*self.presets.items(), *((f"seed {i}", each) for i, each in enumerate(self.seeds))]
        values = {name: self.space.values(schedule) for name, schedule in named}
        ceiling = self.scores.metric.ceiling
        if ceiling is not None:
            if "limit" not in self.study.user_attrs:
                found = [self.scores.score(self.space.schedule(values[name])).error for name in self.presets]
                self.study.set_user_attr("limit", ceiling * min(found))
            self.scores.limit = float(self.study.user_attrs["limit"])
        wanted = {dimension.name for dimension in self.space.dimensions}
        there = {self.space.schedule(each) for each in asked(self.study) if wanted <= set(each)}
        for name, each in values.items():
            schedule = self.space.schedule(each)
            if schedule not in there:
                self.study.enqueue_trial(each, user_attrs={"preset": name})
                there.add(schedule)

    def _search(self) -> None:
        """Ask, score and tell until the budget is used."""
        method, seed = self.settings.decisions.method, self.settings.pairs.seed
        self.study.sampler = study_sampler("evolution", self.space, seed)  # is not asked while presets wait
        ready = False
        done = spent(self.study)
        while self._left(done):
            if not ready and not self._waiting():
                best = complete(self.study)
                values = best[0].params if best else None
                self.study.sampler = study_sampler(method, self.space, seed, values)
                ready = True
            self._one(complete(self.study) if ready else [])
            done = spent(self.study)
            if self.scored == TIMED and self._waiting():
                self._check_time(len(self.presets) + len(self.seeds) + BATCH)

    def _left(self, done: float) -> bool:
        budget, seconds = self.settings.budget, perf_counter() - self.began
        in_time = budget.seconds is None or seconds < budget.seconds or self.scored < TIMED
        return in_time and (budget.trials is None or done < budget.trials)

    def _waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _one(self, best: Sequence[FrozenTrial]) -> None:
        """Ask for one schedule, score it and tell. Interrupted, it counts as not asked."""
        trial = self.study.ask(distributions(self.space))
        sign(trial)
        bar = self.space.schedule(best[FINALISTS - 1].params) if len(best) >= FINALISTS else None
        try:
            found = self.scores.score(self.space.schedule(trial.params), bar)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.scored += 1
        n = len(self.scores.problem.reference)
        trial.set_user_attr("cost", found.pairs / n)
        trial.set_user_attr("error", found.error if np.isfinite(found.error) else WORST)
        if found.pairs == n:
            self.study.tell(trial, found.value)
        else:
            trial.report(found.value, found.pairs)
            self.study.tell(trial, state=TrialState.PRUNED)
        top = complete(self.study)
        self.on_trial(spent(self.study), float(top[0].value) if top else WORST)

    def _check_time(self, count: int) -> None:
        needed, seconds = (perf_counter() - self.began) / self.scored * count, self.settings.budget.seconds
        if seconds is not None and needed > seconds:
            raise ValueError(
                f"seconds={seconds:g}: the presets and one batch are {count} schedules, about "
                f"{needed:.0f} s here: give more time, or fewer pairs"
            )
