"""`search`: the best few-step solver for a pipeline as it stands, found from runs of that pipeline alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from diffplug.rewards import Reward, parse
from diffplug.samplers.fingerprint import conditioning_fingerprint
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.decisions.starts import on_statistics
from diffplug.samplers.search.leader import Callbacks, Problems
from diffplug.samplers.search.metric import FORGIVING, LatentError, Metric, RobustError
from diffplug.samplers.search.picture_metrics import parse_metric
from diffplug.samplers.search.pipeline_problem import (
    PipelineProblem,
    PipelineSetup,
    ends_of,
    parted,
    text_digest,
)
from diffplug.samplers.search.problem import check_loss, loss_of
from diffplug.samplers.search.reference import cache_folder
from diffplug.samplers.search.result import FileRecord, Record, SearchResult, StageResult
from diffplug.samplers.search.settings import Settings
from diffplug.samplers.search.stages import FITS, check_stages, run_stages

__all__ = ["budgeted", "search", "search_compensation", "search_schedule"]
__all__ += ["tune_schedule"]

TEST, VALIDATION, TAIL = 2_000_000, 1_000_000, 3_000_000
"""Where the seeds of the sets of pairs begin, counted from the search's own."""
OLD_STAGES = {"coefficients": "weights", "full": "states"}


def search(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    objective: str | Metric = "error",
    stages: Sequence[str] = FITS,
    start: Sequence[SolverSchedule] = (),
    settings: Settings | None = None,
    storage: Any = None,
    callbacks: Callbacks | None = None,
) -> SearchResult:
    """Return the best solver schedule of so many evaluations, with figures on pairs that it has not seen.

    The target is the pipeline's own result after 200 evaluations from the same noise and prompt, or what the
    objective says. Half of the prompts are searched on, a quarter choose, the last quarter judge; each set
    has noises of its own, the same for every schedule. The pipeline is run as it is; but for the stage
    "gradient" nothing is differentiated, so that compiled and quantised ones will do.

    Args:
        prompts: three at the least, sixty or more for a result that holds; used again with other noises where
        there are fewer than pairs. objective: a text (`picture_metrics.METRIC_FORMS`) or a `Metric`. stages:
        names out of `stages.STAGES`; `budgeted` chooses them by a budget. start: more schedules to begin
        with; another length is refused. settings: pairs, budget and the rest, `Settings.of(pairs=24, ...)`.
        storage: the file or database of progress, to resume and, of decisions, to share between processes.

    Raises ValueError for what cannot be searched, before anything is spent where that is possible.
    """
    metric = parse_metric(objective) if isinstance(objective, str) else objective
    _check_steps(num_inference_steps, start)
    call = (pipe, num_inference_steps, guidance_scale, metric, stages)
    return _Job.of(call, parted(prompts), settings or Settings(), callbacks).run(start, storage)


def budgeted(total: float, stages: Sequence[str] | None = None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the stages that a budget is good for, and the settings that share it out among them.

    total: schedules run on all searched pairs. Few runs find ratios and a grid, more of them weights; several
    hundred are worth a search over decisions first. A reward that has a gradient is climbed by name only.
    """
    chosen = _worth(total) if stages is None else tuple(stages)
    check_stages(chosen)
    if "decisions" not in chosen:
        return chosen, {"fits": total}
    most = total if not set(FITS) & set(chosen) else total / 2
    return chosen, {"trials": most - most // 3, "refinement": int(most // 3), "fits": total - most}


def _worth(total: float) -> tuple[str, ...]:
    if total < 100:
        return ("ratios",)
    if total < 1000 or find_spec("optuna") is None:
        return FITS
    return ("decisions", *FITS)


@dataclass
class _Job:
    """One search of a pipeline: its pairs share what the network said, its result gets its metadata."""

    setup: PipelineSetup
    problems: Problems
    steps: int
    metric: Metric
    stages: Sequence[str]
    settings: Settings
    callbacks: Callbacks
    metadata: dict[str, Any]

    @classmethod
    def of(
        cls,
        call: tuple[Any, ...],
        words: Sequence[Sequence[str]],
        settings: Settings,
        callbacks: Callbacks | None,
    ) -> _Job:
        """Return the search of a call; words: prompts to search on, to choose by, perhaps to judge by."""
        pipe, steps, guidance, metric, stages = call
        check_stages(stages)
        runs, pairs = settings.runs, settings.pairs
        nodes = ends_of(pipe, runs.grid)
        setup = PipelineSetup(
            pipe, guidance, dict(runs.options), runs.max_rows, pairs.seed, nodes, runs.truth_steps, runs.cache
        )
        problems = Problems(
            train=setup.problem(words[0], 0, pairs.counts[0]),
            validation=setup.problem(words[1], VALIDATION, pairs.counts[1]),
            test=setup.problem(words[2], TEST, pairs.counts[2]) if len(words) > 2 else None,
            tail=setup.problem(words[1], TAIL, pairs.tail) if pairs.tail else None,
            prompts=setup.problem(words[0], 0),
        )
        nodes.sigmas(problems.train.levels, steps)  # refuses a grid that the model cannot have
        metadata = {
            **setup.metadata(), "analytic": settings.decisions.analytic, "metric": metric.name,
            "evaluations": steps, "first seed": pairs.seed, "pairs": pairs.counts[0],
            "prompts": text_digest(words),
        }  # fmt: skip
        return cls(setup, problems, steps, metric, stages, settings, callbacks or Callbacks(), metadata)

    def run(
        self, start: Sequence[SolverSchedule], storage: Any, record: Record | None = None
    ) -> SearchResult:
        """Return the result; its file says what was searched, how far it came and what that cost."""
        began, metadata = perf_counter(), self.metadata
        with ExitStack() as stack:
            cache = self._remember(stack)
            space, seeds, study = None, list(start), None
            if "decisions" in self.stages:
                space, more_seeds, metadata = self._space(metadata)
                seeds += more_seeds
                study = self._study(storage, metadata)
            self._set_loss()
            found = run_stages(
                self.problems, self.steps, self.setup.nodes, stages=self.stages, metric=self.metric,
                start=seeds, settings=self.settings, space=space, study=study,
                record=record or FileRecord(None if study else storage, metadata),
                callbacks=self.callbacks,
            )  # fmt: skip
        pairs = self.settings.pairs
        sizes = dict(zip(("searched", "validation", "test"), pairs.counts, strict=True))
        cost = {"network calls": cache.evaluated, "seconds": round(perf_counter() - began, 1)}
        meta = {**metadata, "steps": self.steps, "pairs": {**sizes, "tail": pairs.tail}, **_figures(found)}
        return replace(found, schedule=replace(found.schedule, meta={**meta, **cost}))

    def _remember(self, stack: ExitStack) -> Any:
        train, *others = (p for p in vars(self.problems).values() if isinstance(p, PipelineProblem))
        cache = stack.enter_context(train.rollouts.remembering()).network_cache
        cache.on_evaluation = self.callbacks.on_evaluation
        for each in others:
            each.rollouts.network_cache = cache
        return cache

    def _set_loss(self) -> None:
        """Fits forgive the pairs that the metric forgives."""
        train, forgiving = self.problems.train, getattr(self.metric, "aggregate", "") in FORGIVING
        robust = isinstance(self.metric, RobustError) or (forgiving and len(train.prompts) > 1)
        train.loss = self.problems.validation.loss = loss_of("robust" if robust else "squared", train)
        if self.problems.test is not None:
            self.problems.test.loss = train.loss

    def _space(self, metadata: dict[str, Any]) -> tuple[ScheduleSpace, list[SolverSchedule], dict[str, Any]]:
        train: Any = self.problems.train
        settings = self.settings.decisions
        if settings.analytic and train.levels.flow:
            raise ValueError(
                "flow models have no analytic first step: their pipelines do not scale the noise"
            )
        mean = train.mean() if settings.analytic else None
        space = ScheduleSpace(self.steps, train.levels, self.setup.nodes, settings.analytic, mean)
        if settings.statistics is None:
            return space, [], metadata
        from diffplug.samplers.search.model_statistics import kept_statistics

        path = Path(settings.statistics)
        space = replace(space, statistics=kept_statistics(train, path))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return space, on_statistics(space, settings.grids), {**metadata, "statistics": digest}

    def _study(self, storage: Any, metadata: dict[str, Any]) -> Callable[[], Any]:
        """Return what opens the study, after a look at what would be refused before anything is run."""
        from diffplug.samplers.search.decisions.stage import check_decisions
        from diffplug.samplers.search.decisions.study import check_study, open_study, quiet

        name = f"{self.steps} evaluations"
        space = ScheduleSpace(self.steps, self.problems.train.levels, self.setup.nodes)
        with quiet():
            check_decisions(space, self.settings, ())
            check_study(storage, name, metadata)
        return partial(open_study, storage, name, metadata)


def _check_steps(steps: int, start: Sequence[SolverSchedule]) -> None:
    if steps < 2:
        raise ValueError(f"num_inference_steps={steps}: a search needs at least 2")
    for each in start:
        if each.nfe != steps:
            raise ValueError(
                f"a schedule to begin with has {each.nfe} evaluations, the search is of {steps}: leave it "
                "out, or search that number"
            )


def _figures(found: SearchResult) -> dict[str, Any]:
    """Return what a search reached, for the schedule's own record."""
    taken = [stage for stage in found.stages if stage.accepted]
    baseline = {"solver": found.baseline, "validation": found.presets[found.baseline]}
    return {
        "metric": found.metric,
        "stage": taken[-1].name if taken else "presets",
        "baseline": {**baseline, "test": found.baseline_test},
        "validation": found.validation,
        "test": found.test,
        "amplification": taken[-1].amplification if taken else None,
        "spent": round(found.spent, 2),
        "versions": {name: version(name) for name in ("diffusers", "torch")},
    }


def search_compensation(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    held_out: Sequence[str] | None = None,
    rungs: Sequence[str] = FITS,
    loss: str = "squared",
    resume: bool = True,
    on_rung: Callable[[StageResult], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_evaluation: Callable[[], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Return the best solver that stages of fits find; a thin name over `search`, with few pairs in mind.

    Args:
        prompts: to fit to; ten are enough for "ratios", sixty for the stages above. held_out: to choose by;
        default: every second prompt is kept back. rungs: out of "ratios" (DC-Solver, arXiv 2409.03755),
        "grid", "weights" and "states". loss: "squared" errors or a "robust" loss of them, which lets go of
        pairs that end in another picture. resume: continue after the last finished stage of an interrupted
        search, kept in the folder of converged results. options: further settings (`Settings.of`): grid,
        seed, tail, truth_steps, options, max_rows, cache.

    Raises ValueError for fewer than two prompts, unknown names, steps below 2, and pipelines whose scheduler
    is not one of ordinary noise levels.
    """
    fit_to, judge_by = _split(prompts, held_out)
    _check_steps(num_inference_steps, ())
    check_loss(loss)
    stages = [OLD_STAGES.get(name, name) for name in rungs]
    settings = Settings.of(**{"pairs": len(fit_to), "validation": len(judge_by), **options})
    given = {"on_result": on_rung, "on_stage": on_stage, "on_evaluation": on_evaluation}
    callbacks = Callbacks(**{name: each for name, each in given.items() if each is not None})  # type: ignore[arg-type]
    call = (pipe, num_inference_steps, guidance_scale, LatentError() if loss == "squared" else RobustError())
    job = _Job.of((*call, stages), (fit_to, judge_by), settings, callbacks)
    known = {**job.metadata, "conditioning": conditioning_fingerprint(pipe)}
    return job.run((), None, FileRecord.named(cache_folder(settings.runs.cache), known, anew=not resume))


def _split(prompts: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[str], list[str]]:
    fit_to, judge_by = list(prompts), list(held_out or ())
    if held_out is None:
        fit_to, judge_by = fit_to[::2], fit_to[1::2]
    if not fit_to or not judge_by:
        raise ValueError(
            f"{len(fit_to)} prompts to fit to and {len(judge_by)} to judge by: give at least one of each, "
            "and ten or more for a result that holds"
        )
    return fit_to, judge_by


def search_schedule(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    metric: str | Metric = "latent-mse",
    seeds: Sequence[SolverSchedule] = (),
    storage: Any = None,
    on_trial: Callable[[float, float], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Return the best schedule that a search over every decision finds (arXiv 2312.07243), polished by fits.

    A thin name over `search` with the stage "decisions" alone. options: further settings (`Settings.of`):
    trials (400), refinement (100), seconds, prune, pairs, validation, test, tail, seed, method, grid, grids,
    analytic, statistics, truth_steps, options, max_rows, cache. Raises ValueError as `search` does.
    """
    callbacks = Callbacks() if on_trial is None else Callbacks(on_trial=on_trial)
    return search(
        pipe, prompts, num_inference_steps, guidance_scale, objective=metric, stages=("decisions",),
        start=seeds, settings=Settings.of(**{"trials": 400, "refinement": 100, **options}), storage=storage,
        callbacks=callbacks,
    )  # fmt: skip


def tune_schedule(
    pipe: Any,
    prompts: Sequence[str],
    schedule: SolverSchedule,
    reward: str | Reward,
    guidance_scale: float | None = None,
    *,
    ceiling: float = 1.0,
    storage: Any = None,
    on_step: Callable[[int, float, float], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Return a schedule whose pictures a reward likes better, by gradients through the pipeline.

    A thin name over `search` with the stage "gradient" alone. reward: a spec or a callable with a gradient
    with respect to its pictures. ceiling: rewards can be flattered, so that what has more than this many
    times the start's latent error on the validation pairs is not taken. storage: a JSON file to resume from.
    options: further settings (`Settings.of`): steps (400), batch, rate, check_every, checkpoints, validation
    and test (64), tail, seed, truth_steps, options, max_rows, cache.

    A step costs about 3 times (4 with checkpoints) the evaluations of `batch` pictures. Raises ValueError for
    a reward or a pipeline without gradients, settings that cannot be, and a file of another search.
    """
    from diffplug.samplers.search.picture_metrics import RewardScore

    called, label = (parse(reward), reward) if isinstance(reward, str) else (reward, _name(reward))
    metric = RewardScore(reward=called, label=label, ceiling=ceiling)
    settings = Settings.of(**{"pairs": 64, "validation": 64, "test": 64, **options})
    return search(
        pipe, prompts, schedule.nfe, guidance_scale, objective=metric, stages=("gradient",),
        start=(schedule,), settings=settings, storage=storage,
        callbacks=Callbacks() if on_step is None else Callbacks(on_step=on_step),
    )  # fmt: skip


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
