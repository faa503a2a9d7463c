"""S3: evolution of solver schedules, guided by a predictor of their rank, as a sampler for Optuna.

Multi-stage search of arXiv 2312.07243: evaluate some schedules, fit a predictor to all of them, let it choose
among many children of the best, evaluate those, and again. The predictor ranks, it does not regress: scores
span orders of magnitude, and only their order decides who has children. Half of what it chooses it chooses
among siblings: it expects little of a good schedule that stands alone, and the families of the first good
neighbourhood would be all that is ever evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Linear
from diffplug.samplers.search.decisions.space import FIRST, Dimension, ScheduleSpace, Values

__all__ = ["RankPredictor", "S3Sampler", "TreeRanks", "crossed", "distributions", "features", "mutated"]
__all__ += ["random_values"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NAMED = {"data": 1.0, "noise": 0.0, "ems": 2.0}
PER_STEP = 6  # numbers that `features` has for each step
RATES = (0.03, 0.4)
"""How many of the decisions change in a mutation, drawn anew for each: some children are near, some far."""

WALK = {"gap": 0.5, "mix": 0.4, "scale": 0.2}
"""The largest standard deviations of the steps that real numbers take; the smallest are a tenth of it."""

EAGER = {"gap": 2.0}
"""Kinds of numbers that change more often than others."""

WHOLE_LISTS = 0.5
"""How often a crossing takes a kind of decision as a whole, not step by step."""


class RankPredictor(Protocol):
    """Learns from features [n, d] and scores [n], lower the better; predicts numbers in the same order."""

    def fit(self, rows: Floats, scores: Floats) -> None:
        """Forget what was learned before, and learn from all rows."""

    def predict(self, rows: Floats) -> Floats:
        """Return a number for each row, the smaller the better the score it expects."""


class TreeRanks:
    """Extremely randomised trees on the ranks of the scores; a fit takes less than a second."""

    def __init__(self, seed: int = 0, trees: int = 60) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        self.trees = ExtraTreesRegressor(trees, random_state=seed, min_samples_leaf=2)

    def fit(self, rows: Floats, scores: Floats) -> None:
        self.trees.fit(rows, np.argsort(np.argsort(scores)) / len(scores))

    def predict(self, rows: Floats) -> Floats:
        return np.asarray(self.trees.predict(rows), dtype=np.float64)


class S3Sampler(optuna.samplers.BaseSampler):
    """Predictor-guided evolution over a `ScheduleSpace`.

    Enqueue presets first (`study.enqueue_trial(space.values(schedule))`): what they score is where it starts.
    Pruned trials teach the predictor by their last reported value, and have no children.

    Args:
        seed: of every random choice; a trial's depends on the seed and its number only. parents: the best
        that have children. children: bred for the predictor to choose from; 0 for plain evolution. batch: how
        many of them are evaluated before the predictor learns again. crossing: share of children with two
        parents. explore: share of each batch that is taken without asking the predictor. families: share of
        the others for which children of one parent compete with each other only, the best parents first.
        predictor: by default `TreeRanks`.
    """

    def __init__(
        self,
        space: ScheduleSpace,
        *,
        seed: int = 0,
        parents: int = 15,
        children: int = 300,
        batch: int = 20,
        crossing: float = 0.3,
        explore: float = 0.1,
        families: float = 0.5,
        predictor: RankPredictor | None = None,
    ) -> None:
        for name, value, least in (("parents", parents, 1), ("children", children, 0), ("batch", batch, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: give at least {least}")
        for name, share in (("crossing", crossing), ("explore", explore), ("families", families)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: a share, give a number from 0 to 1")
        self.space, self.seed = space, seed
        self.parents, self.children, self.batch = parents, children, batch
        self.crossing, self.explore, self.families = crossing, explore, families
        self.predictor = predictor or TreeRanks(seed)
        self._batch: tuple[int, list[Values]] = (-1, [])

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every number of the space, for every trial."""
        return distributions(self.space)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next child; random values while nothing has been evaluated."""
        trials = study.get_trials(deepcopy=False)
        place, first = _place(trials, trial.number)
        rng = np.random.default_rng([self.seed, place])
        done = [
            each
            for each in trials
            if each.state in (TrialState.COMPLETE, TrialState.PRUNED)
            and each.value is not None
            and np.isfinite(each.value)
            and set(search_space) <= set(each.params)
        ]
        if not done:
            return random_values(self.space, rng)
        begin = first + (place - first) // self.batch * self.batch
        if self._batch[0] != begin:
            rng = np.random.default_rng([self.seed, begin])
            known = [each for each in done if _place(trials, each.number)[0] < begin] or done
            self._batch = begin, self._bred(sorted(known, key=lambda each: float(each.value)), rng)
        children = self._batch[1]
        return children[(place - begin) % len(children)] if children else random_values(self.space, rng)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value, for a number outside the space."""
        rng = np.random.default_rng([self.seed, trial.number, len(param_name)])
        return optuna.samplers.RandomSampler(int(rng.integers(2**31))).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _bred(self, done: Sequence[FrozenTrial], rng: np.random.Generator) -> list[Values]:
        """Return the next batch, best predicted first; no schedule that was evaluated before."""
        known = {self.space.schedule(each.params): each for each in reversed(done)}
        whole = [each.params for each in reversed(known.values()) if each.state == TrialState.COMPLETE]
        best = whole[: self.parents]
        litter: dict[SolverSchedule, tuple[Values, int]] = {}
        for _ in range(4 * max(self.children, self.batch)):
            child, parent = self._child(best, rng)
            schedule = self.space.schedule(child)
            if schedule not in known:
                litter.setdefault(schedule, (child, parent))
            if len(litter) >= max(self.children, self.batch):
                break
        children = [child for child, _ in litter.values()]
        if self.children and len(done) > self.batch:
            chosen = self._chosen(done, children, np.array([parent for _, parent in litter.values()]), rng)
            return [children[i] for i in chosen]
        return children[: self.batch]

    def _chosen(
        self, done: Sequence[FrozenTrial], children: list[Values], parents: Ints, rng: np.random.Generator
    ) -> list[int]:
        """Return the best predicted of all, the best predicted of each parent, and a few at random."""
        rows = np.array([features(self.space, each.params) for each in done])
        self.predictor.fit(rows, np.array([float(each.value) for each in done if each.value is not None]))
        guessed = self.predictor.predict(np.array([features(self.space, child) for child in children]))
        order = np.argsort(guessed, kind="stable")
        asked = self.batch - round(self.explore * self.batch)
        of_families = round(self.families * asked)
        overall, rest = np.split(order, [asked - of_families])
        heirs = rest[np.unique(parents[rest], return_index=True)[1]][:of_families]
        ranked = list(dict.fromkeys([*overall, *heirs, *rest]))
        chosen = [*ranked[:asked], *rng.permutation(ranked[asked:])]
        return [int(i) for i in chosen[: self.batch]]

    def _child(self, best: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> tuple[Values, int]:
        """Return a child, and the index of its parent; children of two are the last family."""
        one, two = (int(i) for i in rng.integers(len(best), size=2))
        if rng.random() < self.crossing:
            return mutated(self.space, crossed(self.space, best[one], best[two], rng), rng), len(best)
        return mutated(self.space, best[one], rng), one


def _place(trials: Sequence[FrozenTrial], number: int) -> tuple[int, int]:
    """Return (a trial's place among those that did not fail, how many were enqueued before all others).

    What was interrupted gives its place to its successor, so that a search that is resumed in the middle of a
    batch breeds the same batch again and ends where it would have ended.
    """
    sound = [each for each in trials if each.state != TrialState.FAIL]
    enqueued = sum("fixed_params" in each.system_attrs for each in sound)
    return sum(each.number < number for each in sound), enqueued


def distributions(space: ScheduleSpace) -> dict[str, BaseDistribution]:
    """Return the space in Optuna's terms, for any of its samplers."""
    return {
        d.name: FloatDistribution(d.low, d.high) if d.real else CategoricalDistribution(d.choices)
        for d in space.dimensions
    }


def features(space: ScheduleSpace, values: Mapping[str, Any]) -> Floats:
    """Return what a predictor sees: the lambdas of the grid, how it begins, and six numbers for each step."""
    schedule = space.schedule(values)
    lams = [lam if np.isfinite(lam) else 10.0 for lam in schedule.nodes.values]
    rows: list[float] = [*lams, *[0.0] * (space.slots + 1 - len(lams))]
    rows += [float(len(schedule.steps)), float(FIRST.index(schedule.first))]
    for i in range(space.slots):
        if i >= len(schedule.steps):
            rows += [0.0] * PER_STEP
            continue
        step = schedule.steps[i]
        mix = step.param.l if isinstance(step.param, Linear) else NAMED[step.param]
        first = step.predict.derivatives[0] if step.predict.derivatives else None
        rows += [
            mix,
            float(step.predict.order),
            float(len(first.points)) if first else 0.0,
            first.scale.c if first else 0.0,
            float(step.correct is not None),
            float(-step.predict.start),
        ]
    return np.array(rows)


def random_values(space: ScheduleSpace, rng: np.random.Generator) -> Values:
    """Return values drawn independently and evenly: mostly bad schedules."""
    return {dimension.name: _drawn(dimension, rng) for dimension in space.dimensions}


def mutated(space: ScheduleSpace, values: Mapping[str, object], rng: np.random.Generator) -> Values:
    """Return a copy with some decisions changed, at least one."""
    found = dict(values)
    while found == dict(values):
        rate, width = _log_uniform(*RATES, rng), _log_uniform(0.1, 1.0, rng)
        for dimension in space.dimensions:
            kind = dimension.name.partition("_")[0]
            if rng.random() < rate * EAGER.get(kind, 1.0):
                found[dimension.name] = _changed(dimension, kind, found[dimension.name], width, rng)
    return found


def crossed(
    space: ScheduleSpace, one: Mapping[str, object], two: Mapping[str, object], rng: np.random.Generator
) -> Values:
    """Return a child of two: each kind of decision from one of them, as a whole or step by step."""
    kinds = sorted({dimension.name.partition("_")[0] for dimension in space.dimensions})
    whole = {kind: (rng.random() < WHOLE_LISTS, rng.random() < 0.5) for kind in kinds}
    found: Values = {}
    for dimension in space.dimensions:
        together, from_one = whole[dimension.name.partition("_")[0]]
        chosen = from_one if together else rng.random() < 0.5
        found[dimension.name] = (one if chosen else two)[dimension.name]
    return found


def _drawn(dimension: Dimension, rng: np.random.Generator) -> object:
    if dimension.real:
        return float(rng.uniform(dimension.low, dimension.high))
    return dimension.choices[int(rng.integers(len(dimension.choices)))]


def _changed(
    dimension: Dimension, kind: str, value: object, width: float, rng: np.random.Generator
) -> object:
    if not dimension.real:
        return _drawn(dimension, rng)
    if kind == "scale" and rng.random() < 0.2:
        return 0.0
    moved = float(value) + rng.normal(0, width * WALK[kind])  # type: ignore[arg-type]
    return float(np.clip(moved, dimension.low, dimension.high))


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
