"""The search over whole solver schedules: Optuna proposes, fresh pairs judge, least squares polish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna

from diffplug.registry import unknown
from diffplug.samplers.nodes import Nodes
from diffplug.samplers.presets import ddim, deis, dpmpp, res_multistep, unipc
from diffplug.samplers.schedule import SolverSchedule
from diffplug.samplers.search import rungs
from diffplug.samplers.search.problem import Errors, Problem, errors
from diffplug.samplers.search.s3 import S3Sampler, distributions
from diffplug.samplers.search.space import ScheduleSpace

__all__ = ["METHODS", "METRICS", "ScheduleSearch", "preset_schedules", "search_space", "study_sampler"]

METRICS: dict[str, Callable[[Errors], float]] = {
    "mean": lambda off: off.mean,
    "trimmed": lambda off: float(np.sort(off.of_pairs)[: math.ceil(0.95 * len(off.of_pairs))].mean()),
    "median": lambda off: float(np.median(off.of_pairs)),
    "log": lambda off: float(np.log(off.of_pairs + 1e-12).mean()),
}
"""What is minimised, from the squared errors of the pairs. "mean" counts pairs that end in another place; the
others forgive some of them, and then the share of such pairs has to be watched."""

METHODS = ("s3", "evolution", "tpe", "nsga2", "random")
SEED_GRIDS = ("linspace", "trailing", "karras", "log-snr", "beta57", "exponential")
FINALISTS = 5


@dataclass(frozen=True)
class ScheduleSearch:
    """What a search found.

    schedule: the winner. validation: its errors on pairs that were not searched on. trials: schedules that
    were evaluated. baseline: the best preset on the validation pairs, with its errors. history: the best
    score so far after each trial. study: Optuna's own record.
    """

    schedule: SolverSchedule
    validation: dict[str, float]
    trials: int
    baseline: tuple[str, dict[str, float]]
    history: tuple[float, ...]
    study: Any = field(repr=False)

    @property
    def improved(self) -> bool:
        """Whether the winner is better than every preset on the validation pairs."""
        return self.validation["mean"] < self.baseline[1]["mean"]


def preset_schedules(space: ScheduleSpace) -> dict[str, SolverSchedule]:
    """Known solvers on known grids, by name, for a space's number of evaluations and its ends."""
    final, n = "zero" if space.nodes.ends_clean else "sigma_min", space.evaluations
    found: dict[str, SolverSchedule] = {}
    for name in SEED_GRIDS:
        grid = Nodes(kind="name", name=name, final=final)
        made = {
            "DDIM": lambda grid=grid: ddim(n, grid),
            "DPM-Solver++ 2M": lambda grid=grid: dpmpp(n, grid),
            "res_multistep": lambda grid=grid: res_multistep(n, grid),
            "DPM-Solver++ 3M": lambda grid=grid: dpmpp(n, grid, order=3, true_third=True),
            "UniPC-2": lambda grid=grid: unipc(n, grid),
            "UniPC-3": lambda grid=grid: unipc(n, grid, order=3),
            "DEIS-2": lambda grid=grid: deis(n, grid),
            "DEIS-3": lambda grid=grid: deis(n, grid, order=3),
        }
        try:
            grid.sigmas(space.levels, n)
        except ValueError:
            continue  # a grid that does not exist for this model or number of steps
        found |= {f"{solver}, {name}": make() for solver, make in made.items()}
    return found


def study_sampler(method: str, space: ScheduleSpace, seed: int) -> Any:
    """Optuna's sampler for a name out of `METHODS`; "evolution" is "s3" without its predictor."""
    if method not in METHODS:
        raise unknown("search method", method, list(METHODS))
    if method in ("s3", "evolution"):
        return S3Sampler(space, seed=seed, children=300 if method == "s3" else 0)
    samplers = optuna.samplers
    if method == "tpe":
        return samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=20)
    return (
        samplers.NSGAIISampler(seed=seed, population_size=40)
        if method == "nsga2"
        else samplers.RandomSampler(seed)
    )


def search_space(
    train: Problem,
    validation: Problem,
    space: ScheduleSpace,
    *,
    trials: int = 400,
    method: str = "s3",
    metric: str = "mean",
    refine: bool = True,
    seed: int = 0,
    storage: Any = None,
    study_name: str | None = None,
    on_trial: Callable[[int, float], None] | None = None,
) -> ScheduleSearch:
    """The best schedule of a space after so many evaluated schedules (arXiv 2312.07243, and beyond it).

    Presets are evaluated first. The five best are scored again on the validation pairs, and with `refine`
    the winner's grid and coefficients are fitted by least squares, kept only where validation agrees.

    Args:
        trials: schedules evaluated in all, those of an interrupted study in `storage` included. method: out
        of `METHODS`. metric: out of `METRICS`. storage: of Optuna ("sqlite:///search.db"), to resume and to
        share between processes; needs a `study_name`. on_trial: told (number of trials, best score).

    Raises ValueError for unknown names, and for fewer trials than there are presets.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, list(METRICS))
    presets = preset_schedules(space)
    if trials <= len(presets):
        raise ValueError(f"trials={trials}: the {len(presets)} presets come first, give more than that")
    score = METRICS[metric]
    sampler = study_sampler(method, space, seed)
    with _quiet():
        study = optuna.create_study(
            sampler=sampler, storage=storage, study_name=study_name, load_if_exists=storage is not None
        )
        if not study.trials:
            for schedule in presets.values():
                study.enqueue_trial(space.values(schedule))
        names = distributions(space)

        def objective(trial: Any) -> float:
            values = {
                name: trial.suggest_float(name, each.low, each.high)
                if hasattr(each, "low")
                else trial.suggest_categorical(name, each.choices)
                for name, each in names.items()
            }
            value = score(errors(train, space.schedule(values)))
            return value if math.isfinite(value) else 1e6

        def told(study: Any, trial: Any) -> None:
            if on_trial is not None:
                on_trial(len(study.trials), float(study.best_value))

        left = trials - sum(each.state.is_finished() for each in study.trials)
        if left > 0:
            study.optimize(objective, n_trials=left, callbacks=[told])
    done = sorted((t for t in study.trials if t.value is not None), key=lambda t: float(t.value))
    finalists = [space.schedule(each.params) for each in done[:FINALISTS]]
    best_name, best_preset = min(presets.items(), key=lambda item: score(errors(validation, item[1])))
    winner = min([*finalists, best_preset], key=lambda schedule: score(errors(validation, schedule)))
    if refine:
        winner = _refined(train, validation, winner, score)
    history = np.minimum.accumulate([float(t.value) for t in study.trials if t.value is not None])
    return ScheduleSearch(
        schedule=winner,
        validation=errors(validation, winner).told(),
        trials=len(done),
        baseline=(best_name, errors(validation, best_preset).told()),
        history=tuple(history.tolist()),
        study=study,
    )


def _refined(
    train: Problem, validation: Problem, schedule: SolverSchedule, score: Callable[[Errors], float]
) -> SolverSchedule:
    """The schedule after least squares on its grid, then on all its coefficients, where validation agrees."""
    seen: list[SolverSchedule] = [schedule]
    for step in (rungs.grid, rungs.coefficients):
        step(train, min(seen, key=lambda each: score(errors(validation, each))), watch=seen.append)
    return min(seen, key=lambda each: score(errors(validation, each)))


class _quiet:
    """Optuna's log is off inside the block."""

    def __enter__(self) -> None:
        self.level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def __exit__(self, *_: Any) -> None:
        optuna.logging.set_verbosity(self.level)
