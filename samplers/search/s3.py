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
from diffplug.samplers.search.mutation import crossed, mutated, random_values
from diffplug.samplers.search.space import FIRST, ScheduleSpace, Values

__all__ = ["RankPredictor", "S3Sampler", "TreeRanks", "distributions", "features"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NAMED = {"data": 1.0, "noise": 0.0, "ems": 2.0}
PER_STEP = 6  # numbers that `features` has for each step


class RankPredictor(Protocol):
    """Learns from features [n, d] and scores [n], lower the better; predicts numbers in the same order."""

    def fit(self, rows: Floats, scores: Floats) -> None:
        """Forget what was learned before, and learn from all rows."""

    def predict(self, rows: Floats) -> Floats:
        """A number for each row, the smaller the better the score it expects."""


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
        self._queue: list[Values] = []

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every number of the space, for every trial."""
        return distributions(self.space)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next child; random values while nothing has been evaluated."""
        rng = np.random.default_rng([self.seed, trial.number])
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        done = [
            each
            for each in study.get_trials(deepcopy=False, states=states)
            if each.value is not None and np.isfinite(each.value) and set(search_space) <= set(each.params)
        ]
        if not done:
            return random_values(self.space, rng)
        if not self._queue:
            self._queue = self._bred(sorted(done, key=lambda each: float(each.value)), rng)
        return self._queue.pop(0)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, for a number outside the space."""
        rng = np.random.default_rng([self.seed, trial.number, len(param_name)])
        return optuna.samplers.RandomSampler(int(rng.integers(2**31))).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _bred(self, done: Sequence[FrozenTrial], rng: np.random.Generator) -> list[Values]:
        """The next batch, best predicted first; no schedule that was evaluated before."""
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
        """The best predicted of all, the best predicted of each parent, and a few at random."""
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
        """A child, and the index of its parent; children of two are a family of their own, the last."""
        one, two = (int(i) for i in rng.integers(len(best), size=2))
        if rng.random() < self.crossing:
            return mutated(self.space, crossed(self.space, best[one], best[two], rng), rng), len(best)
        return mutated(self.space, best[one], rng), one


def distributions(space: ScheduleSpace) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms, for any of its samplers."""
    return {
        d.name: FloatDistribution(d.low, d.high) if d.real else CategoricalDistribution(d.choices)
        for d in space.dimensions
    }


def features(space: ScheduleSpace, values: Mapping[str, Any]) -> Floats:
    """What a predictor sees: the lambdas of the grid, how it begins, and six numbers for each step."""
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
