"""The one driver of searches: stage after stage, each kept only where pairs that it has not seen agree.

presets -> decisions (S3's evolution) -> ratios -> grid -> weights -> states and times -> gradient of a reward
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from time import perf_counter
from typing import Any

import numpy as np

from diffplug.registry import unknown
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import ddim
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search import fits
from diffplug.samplers.search.comparison import PairedComparison, amplification
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.decisions.starts import other_grids, stock_schedules
from diffplug.samplers.search.leader import LARGEST, Callbacks, Leader, Problems, figures
from diffplug.samplers.search.metric import LatentError, Metric, check_metric
from diffplug.samplers.search.problem import errors
from diffplug.samplers.search.result import FileRecord, Record, SearchResult, StageResult, StudyRecord
from diffplug.samplers.search.settings import Settings

__all__ = ["FITS", "STAGES", "check_stages", "run_stages"]

FITS = ("ratios", "grid", "weights", "states")
"""Stages of fits, from few numbers to many: each asks for more pairs than the one before."""
STAGES = ("presets", "decisions", *FITS, "gradient")
"""All stages in their order."""


def check_stages(stages: Sequence[str]) -> None:
    """Raise ValueError for an unknown stage, for one that is there twice, and for none."""
    for place, name in enumerate(stages):
        if name not in STAGES:
            raise unknown("stage", name, list(STAGES))
        if name in stages[:place]:
            raise ValueError(f"stages: {name!r} is there twice, and each is run once: give it once")
    if not stages:
        raise ValueError(f"no stages: give any of {', '.join(STAGES)}")


@dataclass
class _Search:
    """A search as it stands between two stages."""

    problems: Problems
    steps: int
    nodes: Nodes
    judge: PairedComparison
    settings: Settings
    record: Record
    callbacks: Callbacks
    presets: dict[str, SolverSchedule] = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)
    schedule: SolverSchedule = field(init=False)
    baseline: str = ""
    limit: float = LARGEST
    spent: float = 0.0

    @property
    def levels(self) -> Any:
        return self.problems.train.levels

    def begin(self, presets: Mapping[str, SolverSchedule]) -> None:
        """Judge the presets; the best of them is what stages have to beat."""
        self.presets, judge = dict(presets), self.judge
        self.baseline = min(self.presets, key=lambda name: judge.score(self.presets[name]).value)
        self.schedule = self.presets[self.baseline]
        known = [amplification(each, self.levels) or 0.0 for each in self.presets.values()]
        self.limit = max(LARGEST, *known)
        if judge.metric.ceiling is not None:
            judge.limit = judge.metric.ceiling * min(judge.score(s).error for s in self.presets.values())

    def run(self, name: str, work: Callable[[Leader], Any]) -> None:
        """Run a stage, or take its result from the record, and keep its schedule where it is better."""
        key = f"{name} {self._mark()}"
        if (known := self.record.read(key)) is not None:
            try:
                result = StageResult.from_json(known)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.record.damaged()} ({name}: {error})") from error
        else:
            self.callbacks.on_stage(name)
            result = self._done(name, work)
            self.record.write(key, result.to_json())
            self.callbacks.on_result(result)
        self.results.append(result)
        if result.accepted:
            self.schedule = result.schedule

    def _mark(self) -> str:
        """Return a hash of what a stage begins with."""
        begin = [self.schedule.to_json(), *(each.schedule.to_json() for each in self.results)]
        budget = [self.settings.budget.fits, self.settings.budget.refinement]
        return sha256(json.dumps([begin, self.judge.metric.name, budget]).encode()).hexdigest()[:16]

    def _done(self, name: str, work: Callable[[Leader], Any]) -> StageResult:
        began, before = perf_counter(), self._evaluations()
        leader = Leader(self.judge, self.problems.tail, self.limit)
        history = work(leader) or ()
        better = leader.better_than(self.schedule, self.presets[self.baseline])
        schedule = better or (leader.seen[-1] if leader.seen else self.schedule)
        return StageResult(
            name=name,
            schedule=schedule,
            searched={} if name == "gradient" else errors(self.problems.train, schedule).figures(),
            validation=figures(self.judge, schedule),
            evaluations=self._evaluations() - before,
            seconds=round(perf_counter() - began, 1),
            amplification=amplification(schedule, self.levels),
            accepted=better is not None,
            history=history,
        )

    def _evaluations(self) -> int:
        """Return evaluations of all problems, those of a shared count once."""
        problems = (self.problems.train, self.problems.validation, self.problems.tail)
        caches = {id(each.network_cache): each.network_cache for each in problems if each is not None}
        return sum(cache.evaluated for cache in caches.values())

    def of(self, name: str) -> list[SolverSchedule]:
        """Return the schedule that a stage came to, in a list; an empty one where it did not run."""
        return [result.schedule for result in self.results if result.name == name]


def run_stages(
    problems: Problems,
    steps: int,
    nodes: Nodes,
    *,
    stages: Sequence[str] = FITS,
    metric: Metric | None = None,
    start: Sequence[SolverSchedule] = (),
    settings: Settings | None = None,
    space: ScheduleSpace | None = None,
    study: Callable[[], Any] | None = None,
    record: Record | None = None,
    callbacks: Callbacks | None = None,
) -> SearchResult:
    """Return the best schedule of `steps` evaluations, never one that is worse than the best preset.

    Works on any `Problem`s; `search` makes those of a pipeline. nodes: the grid to start from. stages: names
    out of `STAGES`; presets always come first. metric: by default the latent error. start: more schedules to
    begin with. space, study: for the stage "decisions", default all decisions, and a study in memory; the
    latter is a function, asked once nothing else can be refused. record: where finished stages are kept.
    Raises ValueError for unknown stages, for budgets that are too small, and for metrics that give no numbers
    or grow with quality.
    """
    check_stages(stages)
    settings, metric, callbacks = settings or Settings(), metric or LatentError(), callbacks or Callbacks()
    judge = PairedComparison(problems.validation, metric, prune=False)
    record = record or FileRecord(None, {})
    search = _Search(problems, steps, nodes, judge, settings, record, callbacks)
    if "gradient" in stages:
        from diffplug.samplers.search.gradient_stage import check_gradient

        check_gradient(metric, problems.train)
    finalists: tuple[tuple[float, float], ...] = ()
    made: Any = None
    if "decisions" in stages:
        finalists, made = _decisions(search, metric, space, study, start)
    else:
        callbacks.on_stage("presets")
        alone = set(stages) <= {"gradient"} and start
        names = {f"start {i}" if i else "start": each for i, each in enumerate(start)}
        search.begin(names if alone else stock_schedules(steps, nodes))
        if start and not alone:
            search.run("start", lambda leader: leader.watch_all(start))
    _fits(search, [name for name in FITS if name in stages])
    if "gradient" in stages:
        _gradient(search)
    return _result(search, finalists, made)


def _decisions(
    search: _Search, metric: Metric, space: ScheduleSpace | None, study: Any, seeds: Sequence[SolverSchedule]
) -> tuple[tuple[tuple[float, float], ...], Any]:
    """Run the stage "decisions"; return the finalists' values on both sets, and the study."""
    from diffplug.samplers.search.decisions.stage import DecisionSearch, check_decisions
    from diffplug.samplers.search.decisions.study import open_study, quiet, spent

    space = space or ScheduleSpace(search.steps, search.levels, search.nodes)
    presets = check_decisions(space, search.settings, seeds)
    scores = PairedComparison(search.problems.train, metric, prune=search.settings.budget.prune)
    check_metric(metric, search.problems.train, search.problems.train.final(next(iter(presets.values()))))
    with quiet():
        found = open_study(None, "decisions", {}) if study is None else study()
    search.record = StudyRecord(found)
    search.callbacks.on_stage("decisions")
    work = DecisionSearch(found, space, scores, search.settings, presets, seeds, search.callbacks.on_trial)
    work.run()
    search.begin(work.known_presets())
    five = work.finalists()

    def judged(leader: Leader) -> tuple[tuple[float, float], ...]:
        for each in (*five, *seeds):
            leader.watch(each)
        winner = leader.better_than(search.schedule, search.schedule) or search.schedule
        if search.settings.budget.refinement:
            search.spent += work.refine(winner, leader, search.record)
        return work.history()

    search.results.append(search._done("decisions", judged))
    if search.results[-1].accepted:
        search.schedule = search.results[-1].schedule
    search.callbacks.on_result(search.results[-1])
    search.spent += spent(found)
    return tuple((five[each], search.judge.score(each).value) for each in five), found


def _fits(search: _Search, names: Sequence[str]) -> None:
    """Run the stages of fits; a budget is shared evenly by those that are left."""
    total = search.settings.budget.fits
    left = np.inf if total is None else total
    for k, name in enumerate(names):
        meter = fits.Metered(search.problems.train, left // (len(names) - k) if np.isfinite(left) else left)

        def work(leader: Leader, name: str = name, meter: fits.Metered = meter) -> None:
            with suppress(fits.Spent):
                _FIT[name](search, meter, leader)

        search.run(name, work)
        left -= meter.used
        search.spent += meter.used


def _gradient(search: _Search) -> None:
    from diffplug.samplers.search.gradient_stage import climb_gradient

    problem: Any = search.problems.prompts or search.problems.train
    settings, seed = search.settings.gradient, search.settings.pairs.seed
    start, record, callbacks = search.schedule, search.record, search.callbacks
    search.run(
        "gradient",
        lambda leader: climb_gradient(problem, start, leader, record, settings, seed, callbacks),
    )


def _result(search: _Search, finalists: tuple[tuple[float, float], ...], study: Any) -> SearchResult:
    test, judge = search.problems.test, search.judge
    tested = None if test is None else PairedComparison(test, judge.metric, prune=False)
    baseline = search.presets[search.baseline]
    return SearchResult(
        schedule=search.schedule,
        metric=judge.metric.name,
        baseline=search.baseline,
        presets={name: figures(judge, each) for name, each in search.presets.items()},
        validation=figures(judge, search.schedule),
        stages=tuple(search.results),
        test=None if tested is None else figures(tested, search.schedule),
        baseline_test=None if tested is None else figures(tested, baseline),
        spent=search.spent,
        finalists=finalists,
        study=study,
        progress=getattr(search.record, "path", None),
    )


def _ratios(search: _Search, train: fits.Metered, leader: Leader) -> None:
    """Fit DC-Solver's ratios on the best corrector policy, the paper's, DDIM and the best presets."""
    steps, nodes = search.steps, search.nodes
    times = search.levels.time_of_sigma(nodes.sigmas(search.levels, steps)[:-1]).tolist()
    policies = fits.corrector_policies(steps, nodes, times)
    stock = sorted(stock_schedules(steps, nodes).values(), key=lambda each: errors(train, each).mean_loss)
    starts = (
        fits.best(train, policies),
        policies[1],
        ddim(steps, nodes),
        *stock[:2],
        *search.of("decisions"),
    )
    for schedule in dict.fromkeys(starts):
        leader.watch(schedule)
        fits.ratios(train, schedule, watch=leader.watch)


def _grid(search: _Search, train: fits.Metered, leader: Leader) -> None:
    """Fit other nodes for the best multistep solver and for DDIM, from the better of all named grids each.

    With few evaluations, large guidance and sharp data, nodes in the right places are worth more than order.
    """
    grids = (search.nodes, *other_grids(search.nodes))
    families = (
        [each for at in grids for each in fits.multistep(search.steps, at)],
        [ddim(search.steps, at) for at in grids],
    )
    for family in families:
        start = fits.best(train, family)
        leader.watch(start)
        fits.grid(train, start, watch=leader.watch)


def _weights(search: _Search, train: fits.Metered, leader: Leader) -> None:
    """Fit weights of all outputs: on the grid of the stage before, on what was given, on the given grid."""
    starts = [*search.of("grid"), *search.of("decisions"), *search.of("start")]
    starts.append(fits.best(train, fits.multistep(search.steps, search.nodes)))
    for schedule in starts:
        fits.coefficients(train, schedule, watch=leader.watch)


def _states(search: _Search, train: fits.Metered, leader: Leader) -> None:
    """Fit weights of all outputs and all states, and the timesteps that the network is told."""
    below = [*search.of("weights"), *search.of("decisions")]
    start = below[0] if below else fits.best(train, fits.multistep(search.steps, search.nodes))
    leader.watch(start)
    fits.coefficients(train, start, states=True, watch=leader.watch)


_FIT = {"ratios": _ratios, "grid": _grid, "weights": _weights, "states": _states}
