"""`search_schedule`: solver schedules for a pipeline as it stands, by the measure a person cares for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffplug.files import output_folder
from diffplug.report import denoisers
from diffplug.samplers.nodes import Nodes
from diffplug.samplers.origin import architecture, fingerprint
from diffplug.samplers.schedule import SolverSchedule
from diffplug.samplers.search.measure import measure_statistics
from diffplug.samplers.search.memo import digest
from diffplug.samplers.search.metric import Metric, parse_metric
from diffplug.samplers.search.preset_schedules import SEED_GRIDS, on_statistics
from diffplug.samplers.search.problem import PipelineProblem
from diffplug.samplers.search.schedules import Progress, ScheduleSearch, search_space
from diffplug.samplers.search.space import ScheduleSpace
from diffplug.samplers.search.trials import Trials
from diffplug.samplers.solver import SolverScheduler
from diffplug.samplers.statistics import ModelStatistics, load_statistics
from diffplug.scheduler_plug import build, current_scheduler, world

__all__ = ["pipeline_statistics", "search_schedule"]

MEASURED = 16  # pairs for statistics by channel
FIRST_SEEDS = (0, 1_000_000, 2_000_000)
"""Where the seeds of the three sets of pairs begin, counted from the search's own."""


def search_schedule(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    metric: str | Metric = "latent-mse",
    method: str = "s3",
    trials: float | None = 400,
    seconds: float | None = None,
    refinement: int = 100,
    prune: bool = True,
    pairs: int = 64,
    validation: int | None = None,
    test: int | None = None,
    grid: str = "linspace",
    grids: Sequence[str] = SEED_GRIDS,
    analytic: bool = False,
    seeds: Sequence[SolverSchedule] = (),
    seed: int = 0,
    statistics: str | os.PathLike[str] | None = None,
    truth_steps: int = 200,
    options: dict[str, Any] | None = None,
    max_rows: int = 64,
    cache: Path | None = None,
    storage: Any = None,
    on_trial: Progress | None = None,
) -> ScheduleSearch:
    """The best solver schedule of so many evaluations that a search finds, with figures on unseen pairs.

    Searches every decision of a solver (arXiv 2312.07243): grid, prediction types, orders, relaxations,
    correctors. Half of the prompts are searched on, a quarter choose, the last quarter judge; each set has
    noises of its own, the same for every schedule. `result.schedule` goes into `Solver(schedule)` or a file.
    The pipeline is run as it is; nothing is differentiated.

    Args:
        prompts: three at the least, sixty or more for a result that holds; used again with other noises where
        there are fewer than pairs. metric: a text (`metric.METRIC_FORMS`) or a `Metric`. method: out of
        `study.METHODS`. trials, seconds, refinement, prune, seeds: the budget, see `search_space`. pairs:
        searched on; validation, test: default twice as many, and as many. grid: whose ends are kept. grids:
        of the presets that come first. analytic: whether the first step may do without the network, which
        few models with guidance bear. statistics: file of the model's statistics, for steps that stand on
        them (DPM-Solver-v3); measured on the searched pairs and written where it is not there yet. storage: a
        file or database, to resume and to share between processes. options: further keywords of the
        pipeline's call. cache: folder for converged latents.

    Raises ValueError for what cannot be searched, before anything is spent where that is possible.
    """
    counts = (pairs, 2 * pairs if validation is None else validation, pairs if test is None else test)
    measure = parse_metric(metric) if isinstance(metric, str) else metric
    plan = _Plan(pipe, guidance_scale, options or {}, max_rows, seed, _nodes(pipe, grid), truth_steps, cache)
    sets = plan.sets(_parts(prompts), counts)
    began = perf_counter()
    with ExitStack() as stack:
        memo = stack.enter_context(sets[0].trials.remembering()).memo
        for each in sets[1:]:
            each.trials.memo = memo
        space = plan.space(sets[0], num_inference_steps, analytic)
        told = {**plan.told(), "analytic": analytic, "prompts": _digest(prompts), "first seed": seed}
        if statistics is not None:
            space = replace(space, statistics=plan.statistics(sets[0], Path(statistics)))
            told["statistics"] = hashlib.sha256(Path(statistics).read_bytes()).hexdigest()[:16]
        found = search_space(
            sets[0], sets[1], space, test=sets[2], trials=trials, seconds=seconds, method=method,
            metric=measure, refinement=refinement, prune=prune, grids=grids,
            seeds=[*seeds, *on_statistics(space, grids)], seed=seed, storage=storage, told=told,
            on_trial=on_trial,
        )  # fmt: skip
    sizes = dict(zip(("searched", "validation", "test"), counts, strict=True))
    cost = {"network calls": memo.evaluated, "seconds": round(perf_counter() - began, 1)}
    meta = {**told, "steps": num_inference_steps, "method": method, "pairs": sizes, **_figures(found), **cost}
    return replace(found, schedule=replace(found.schedule, meta=meta))


def pipeline_statistics(
    pipe: Any,
    prompts: Sequence[str],
    guidance_scale: float | None = None,
    *,
    points: int = 60,
    elements: bool = False,
    options: dict[str, Any] | None = None,
    max_rows: int = 16,
    seed: int = 0,
) -> ModelStatistics:
    """The statistics of a pipeline's model (`measure_statistics`) on these prompts, a noise for each.

    Save them, and name the file in `search_schedule(statistics=...)` or in a schedule with "ems" steps.
    options: further keywords of the pipeline's call.
    """
    seeds = list(range(seed, seed + len(prompts)))
    trials = Trials(pipe, list(prompts), seeds, points, guidance_scale, options or {}, max_rows)
    problem = PipelineProblem(trials, _nodes(pipe, "linspace"))
    return _measured(problem, points=points, elements=elements, told=_whose(pipe, guidance_scale))


def _measured(problem: PipelineProblem, **options: Any) -> ModelStatistics:
    """Statistics, with a longer probe where the network rounds more."""
    weights = (weight for module in denoisers(problem.trials.pipe) for weight in module.parameters())
    fine = {weight.dtype for weight in weights} <= {torch.float32, torch.float64}
    return measure_statistics(problem, probe=1e-2 if fine else 5e-2, **options)


def _whose(pipe: Any, guidance: float | None) -> dict[str, str]:
    told = "the pipeline's own" if guidance is None else f"{guidance:g}"
    return {"model": fingerprint(pipe), "guidance": told}


@dataclass(frozen=True)
class _Plan:
    """How the pipeline is run, whatever the schedule."""

    pipe: Any
    guidance: float | None
    options: dict[str, Any]
    max_rows: int
    seed: int
    nodes: Nodes
    fine: int
    cache: Path | None

    def sets(self, prompts: Sequence[Sequence[str]], counts: Sequence[int]) -> list[PipelineProblem]:
        """The pairs to search on, to choose by and to judge by."""
        for name, count in zip(("pairs", "validation", "test"), counts, strict=True):
            if count < 1:
                raise ValueError(f"{name}={count}: give at least 1 pair of prompt and noise")
        found = []
        for part, count, first in zip(prompts, counts, FIRST_SEEDS, strict=True):
            words = list(islice(cycle(part), count))
            seeds = list(range(self.seed + first, self.seed + first + count))
            trials = Trials(self.pipe, words, seeds, 4, self.guidance, self.options, self.max_rows)
            found.append(PipelineProblem(trials, self.nodes, self.fine, self.cache))
        return found

    def space(self, train: PipelineProblem, steps: int, analytic: bool) -> ScheduleSpace:
        if steps < 2:
            raise ValueError(f"num_inference_steps={steps}: a search needs at least 2")
        if analytic and train.levels.flow:
            raise ValueError(
                "flow models have no analytic first step: their pipelines do not scale the noise"
            )
        return ScheduleSpace(steps, train.levels, self.nodes, analytic, train.mean() if analytic else None)

    def statistics(self, train: PipelineProblem, path: Path) -> str:
        """The path of the model's statistics; ValueError for those of another model or guidance."""
        if not path.exists():
            output_folder(path.absolute().parent)
            some = train.part(0, min(MEASURED, len(train.prompts)))
            _measured(some, told=_whose(self.pipe, self.guidance)).save(path)
        known = load_statistics(path).told
        for name, here in _whose(self.pipe, self.guidance).items():
            if known.get(name, here) != here:
                raise ValueError(
                    f"the statistics in {str(path)!r} are of {name} {known[name]}, this is {here}: "
                    "name another file, and they are measured"
                )
        return str(path.absolute())

    def told(self) -> dict[str, Any]:
        """What the schedule is for, JSON."""
        return {
            "model": fingerprint(self.pipe),
            "architecture": architecture(self.pipe),
            "pipeline": type(self.pipe).__name__,
            "guidance_scale": self.guidance,
            "grid": self.nodes.name,
            "truth_steps": self.fine,
            "options": {name: digest(value).hex()[:16] for name, value in self.options.items()},
        }


def _nodes(pipe: Any, grid: str) -> Nodes:
    """The grid whose ends are kept; refuses schedulers without ordinary noise levels."""
    build(SolverScheduler, pipe)
    flow = world(current_scheduler(pipe)) == "flow matching"
    return Nodes(kind="name", name=grid, final="zero" if flow else "sigma_min")


def _parts(prompts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Prompts to search on, to choose by and to judge by: none is in two sets."""
    words = list(dict.fromkeys(prompts))
    if len(words) < 3:
        raise ValueError(
            f"{len(words)} different prompts: give at least 3, as some are searched on, some choose and some "
            "judge; sixty or more for a result that holds"
        )
    return [*words[::4], *words[3::4]], words[1::4], words[2::4]


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def _figures(found: ScheduleSearch) -> dict[str, Any]:
    """What the search reached, for the schedule's own record."""
    name, baseline = found.baseline
    return {
        "metric": found.metric,
        "baseline": {"solver": name, "validation": baseline, "test": found.baseline_test},
        "validation": found.validation,
        "test": found.test,
        "gap": found.gap,
        "trials": found.trials,
        "spent": round(found.spent, 2),
        "versions": {each: version(each) for each in ("diffusers", "optuna", "torch")},
    }
