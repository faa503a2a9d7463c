"""`search_compensation`: few-step solvers for a pipeline as it stands, from runs of that pipeline alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffplug.call_arguments import asked_guidance
from diffplug.files import output_folder, read_json, write_json
from diffplug.network_cache import NetworkCache, digest
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import architecture, conditioning_fingerprint, fingerprint
from diffplug.samplers.search.climb import RUNGS, Climb, RungResult, climb
from diffplug.samplers.search.loss import check_loss, loss_of
from diffplug.samplers.search.plan import ends_of
from diffplug.samplers.search.problem import PipelineProblem
from diffplug.samplers.search.reference import cache_folder

__all__ = ["search_compensation"]

FORMAT, VERSION = "solver-search", 1


def search_compensation(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    held_out: Sequence[str] | None = None,
    rungs: Sequence[str] = RUNGS,
    grid: str = "linspace",
    loss: str = "squared",
    seed: int = 0,
    truth_steps: int = 200,
    options: dict[str, Any] | None = None,
    max_rows: int = 64,
    cache: Path | None = None,
    resume: bool = True,
    on_rung: Callable[[RungResult], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Climb:
    """The best solver of so many evaluations that a search finds for a pipeline, with its held-out errors.

    The target is the pipeline's own result after `truth_steps` evaluations, from the same noise and prompt
    (arXiv 2409.03755, section 3.3, and what the rungs say). Nothing is differentiated: any pipeline will do,
    compiled and quantised ones too. `result.schedule` goes into `Solver(schedule)` or a file; it is a stock
    solver where no rung beats all of those on the held-out pairs (`result.improved` tells).

    Args:
        prompts: to fit to; ten are enough for "ratios", sixty for the rungs above. held_out: to judge by;
        default: every second prompt is kept back. seed: of the first pair, the others count up.
        rungs: out of "ratios" (DC-Solver), "grid", "coefficients" and "full". grid: the nodes to start from,
        a name of `grids.GRIDS`. loss: what is made small, "squared" errors or a "robust" loss of them, which
        lets go of pairs that end in another picture (`search/loss.py`). options: further keywords of the
        pipeline's call. max_rows: prompts in one call. cache: folder for truths and unfinished searches, by
        default `truth.cache_folder()`; with `resume`, rungs that an interrupted search of the same kind has
        finished are read from there.
        on_rung, on_stage, on_evaluation: told what is going on.

    Raises ValueError for fewer than two prompts, an unknown rung, grid or loss, steps below 2, and pipelines
    whose scheduler is not one of ordinary noise levels.
    """
    fit_to, judge_by = _split(prompts, held_out)
    if num_inference_steps < 2:
        raise ValueError(f"num_inference_steps={num_inference_steps}: a search needs at least 2")
    check_loss(loss)
    nodes, options = ends_of(pipe, grid), dict(options or {})
    folder = cache_folder() if cache is None else Path(cache)
    seeds = list(range(seed, seed + len(fit_to) + len(judge_by)))
    trials = [
        Rollouts(pipe, part, chosen, num_inference_steps, guidance_scale, options, max_rows)
        for part, chosen in ((fit_to, seeds[: len(fit_to)]), (judge_by, seeds[len(fit_to) :]))
    ]
    train, judge = (PipelineProblem(each, nodes, truth_steps, folder) for each in trials)
    nodes.sigmas(train.levels, num_inference_steps)  # refuses a grid that the model cannot have
    told = {
        **_origin(pipe, trials[0]),
        "grid": grid,
        "loss": loss,
        "truth_steps": truth_steps,
        "pairs": {"fitted": len(fit_to), "held out": len(judge_by), "first seed": seed},
        "prompts": hashlib.sha256(json.dumps([fit_to, judge_by]).encode()).hexdigest()[:16],
    }
    work = _Work(folder, {**told, "conditioning": conditioning_fingerprint(pipe)}, resume)

    def keep(result: RungResult) -> None:
        work.add(result)
        if on_rung is not None:
            on_rung(result)

    with trials[0].remembering() as run:
        trials[1].memo = memo = run.memo
        memo.on_evaluation = on_evaluation
        train.loss = judge.loss = loss_of(loss, train)
        found = climb(
            train, judge, num_inference_steps, nodes,
            climbed=rungs, done=work.done, on_rung=keep, on_stage=on_stage,
        )  # fmt: skip
    work.finish()
    meta = {**told, "metric": "mean squared error of the final latents", **_figures(found, memo)}
    return replace(found, schedule=replace(found.schedule, meta=meta))


def _origin(pipe: Any, trials: Rollouts) -> dict[str, Any]:
    """What the result holds for: the model, and how it is called; guidance is a number where there is one."""
    call = {} if trials.guidance is None else {"guidance_scale": trials.guidance}
    return {
        "model": fingerprint(pipe),
        "architecture": architecture(pipe),
        "pipeline": type(pipe).__name__,
        "steps": trials.steps,
        "guidance_scale": asked_guidance(pipe, {**trials.options, **call}),
        "options": {name: digest(value).hex()[:16] for name, value in trials.options.items()},
    }


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


def _figures(found: Climb, memo: NetworkCache) -> dict[str, Any]:
    """What the search reached, for the schedule's own record."""
    taken = [result for result in found.rungs if result.accepted]
    return {
        "baseline": {"solver": found.baseline, **found.stock[found.baseline]},
        "held out": taken[-1].held_out if taken else found.stock[found.baseline],
        "rung": taken[-1].name if taken else "none",
        "evaluations": memo.evaluated,
        "seconds": round(sum(result.seconds for result in found.rungs), 1),
        "versions": {name: version(name) for name in ("diffusers", "torch")},
    }


class _Work:
    """The finished rungs of an unfinished search, in a file named by what is searched."""

    def __init__(self, folder: Path, told: dict[str, Any], resume: bool) -> None:
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
        self.path, self.told = folder / f"search-{name}.json", told
        self.done: list[RungResult] = self._read() if resume and self.path.exists() else []

    def _read(self) -> list[RungResult]:
        document = read_json(self.path)
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            return [RungResult.from_json(each) for each in document["rungs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(self.path)!r} is no unfinished search ({error}): remove it, or do not resume"
            ) from error

    def add(self, result: RungResult) -> None:
        self.done.append(result)
        output_folder(self.path.parent)
        rungs = [each.to_json() for each in self.done]
        write_json(self.path, {"format": FORMAT, "version": VERSION, "search": self.told, "rungs": rungs})

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)
