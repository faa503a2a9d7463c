"""`search_schedule`: solver schedules for a pipeline as it stands, by the measure a person cares for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffplug.denoiser import denoisers
from diffplug.files import output_folder
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import fingerprint
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.measure import measure_statistics
from diffplug.samplers.search.metric import Metric, parse_metric
from diffplug.samplers.search.plan import Plan, ends_of, parted, text_digest
from diffplug.samplers.search.preset_schedules import SEED_GRIDS, on_statistics
from diffplug.samplers.search.problem import PipelineProblem
from diffplug.samplers.search.schedules import Progress, ScheduleSearch, search_space
from diffplug.samplers.search.space import ScheduleSpace
from diffplug.samplers.solver.statistics import ModelStatistics, load_statistics

__all__ = ["pipeline_statistics", "search_schedule"]

MEASURED = 16  # pairs for statistics by channel


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
    plan = Plan(pipe, guidance_scale, options or {}, max_rows, seed, ends_of(pipe, grid), truth_steps, cache)
    sets = plan.sets(parted(prompts), counts)
    began = perf_counter()
    with ExitStack() as stack:
        memo = stack.enter_context(sets[0].trials.remembering()).memo
        for each in sets[1:]:
            each.trials.memo = memo
        space = _space(plan, sets[0], num_inference_steps, analytic)
        told = {**plan.told(), "analytic": analytic, "prompts": text_digest(prompts), "first seed": seed}
        if statistics is not None:
            space = replace(space, statistics=_statistics(plan, sets[0], Path(statistics)))
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
    trials = Rollouts(pipe, list(prompts), seeds, points, guidance_scale, options or {}, max_rows)
    problem = PipelineProblem(trials, ends_of(pipe, "linspace"))
    return _measured(problem, points=points, elements=elements, told=_whose(pipe, guidance_scale))


def _measured(problem: PipelineProblem, **options: Any) -> ModelStatistics:
    """Statistics, with a longer probe where the network rounds more."""
    weights = (weight for module in denoisers(problem.trials.pipe) for weight in module.parameters())
    fine = {weight.dtype for weight in weights} <= {torch.float32, torch.float64}
    return measure_statistics(problem, probe=1e-2 if fine else 5e-2, **options)


def _whose(pipe: Any, guidance: float | None) -> dict[str, str]:
    told = "the pipeline's own" if guidance is None else f"{guidance:g}"
    return {"model": fingerprint(pipe), "guidance": told}


def _space(plan: Plan, train: PipelineProblem, steps: int, analytic: bool) -> ScheduleSpace:
    if steps < 2:
        raise ValueError(f"num_inference_steps={steps}: a search needs at least 2")
    if analytic and train.levels.flow:
        raise ValueError("flow models have no analytic first step: their pipelines do not scale the noise")
    return ScheduleSpace(steps, train.levels, plan.nodes, analytic, train.mean() if analytic else None)


def _statistics(plan: Plan, train: PipelineProblem, path: Path) -> str:
    """The path of the model's statistics; ValueError for those of another model or guidance."""
    if not path.exists():
        output_folder(path.absolute().parent)
        some = train.part(0, min(MEASURED, len(train.prompts)))
        _measured(some, told=_whose(plan.pipe, plan.guidance)).save(path)
    known = load_statistics(path).told
    for name, here in _whose(plan.pipe, plan.guidance).items():
        if known.get(name, here) != here:
            raise ValueError(
                f"the statistics in {str(path)!r} are of {name} {known[name]}, this is {here}: "
                "name another file, and they are measured"
            )
    return str(path.absolute())


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
