"""Searches over solver schedules: S3 beside TPE, evolution and chance, at equal cost, judged on fresh noises.

    python -m benchmarks.search                                    the two models in closed form, three seeds
    python -m benchmarks.search --models shapes --guidance 5       Shapes, and right pictures counted

The mixture and the digits are those of the project's bars: 2,048 and 1,024 noises to search on, as many again
to choose by, twice as many to judge by. Cost is counted in schedules run on all searched pairs, those of
the refinement included; what is run on the pairs that choose is not counted. Runs that are in the file
already, of the same model, budget and pairs, are not repeated; those of other models stay as they are.
Studies of pipelines are kept in --studies and gone on with; they search by --metric, the models in closed
form by the mean error, and all are judged by the mean error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from rich.progress import Progress as Bars

from benchmarks.closed_form import ModelProblem
from benchmarks.command import opened
from benchmarks.compact import kept_results, thinned, written
from benchmarks.search_methods import method as searcher
from benchmarks.search_models import LEVELS, MODELS, NODES, problems
from diffplug.files import output_folder
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import fingerprint
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.decisions.space import ScheduleSpace
from diffplug.samplers.search.decisions.starts import on_statistics, preset_schedules
from diffplug.samplers.search.decisions.study import check_study, open_study
from diffplug.samplers.search.leader import Callbacks, Problems
from diffplug.samplers.search.metric import FORGIVING
from diffplug.samplers.search.model_statistics import measure_statistics
from diffplug.samplers.search.picture_metrics import parse_metric
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.problem import Problem, errors, loss_of
from diffplug.samplers.search.result import SearchResult
from diffplug.samplers.search.settings import Settings
from diffplug.samplers.search.stages import run_stages
from diffplug.shapes import grade, sample_prompts

RESULTS = Path(__file__).parent / "results"
SIZES = {"mixture": (2048, 2048, 4096), "digits": (1024, 1024, 2048)}
BUDGETS = {"mixture": 600, "digits": 400, "shapes": 300}
BARS = {"mixture": {"mean": 4e-3, "median": 6e-4}, "digits": {"mean": 7e-3}}
METHODS = ("random", "evolution", "tpe", "s3", "s3 + refinement")
MORE = ("s3 + statistics", "s3 + statistics + refinement")  # with the steps of DPM-Solver-v3
REFINEMENT = 1 / 3  # the share of the budget that the refinement gets


@dataclass
class Bench:
    """One model: pairs to search on, to choose by and to judge by."""

    train: Problem
    validation: Problem
    fresh: Problem
    space: ScheduleSpace

    def figures(self, schedule: SolverSchedule) -> dict[str, float]:
        """Errors on the fresh pairs; for Shapes also the share of pictures that are right in every fact."""
        off = errors(self.fresh, schedule)
        share = float((off.of_pairs > 0.1).mean())
        found = {**off.figures(), "median": float(np.median(off.of_pairs)), "above .1": share}
        if any(self.fresh.prompts):
            found["strict"] = shown_strict(self.fresh, self.fresh.final(schedule))
        return found

    def knowing(self, path: Path) -> ScheduleSpace:
        """The space with steps that stand on the model's statistics, measured into a file."""
        measure_statistics(self.train, elements=isinstance(self.train, ModelProblem)).save(path)
        return replace(self.space, statistics=str(path))

    def best_preset(self, evaluations: int | None = None) -> tuple[str, SolverSchedule]:
        """The preset with the smallest mean error on the searched pairs."""
        space = self.space if evaluations is None else ScheduleSpace(evaluations, self.space.levels, NODES)
        known = preset_schedules(space)
        return min(known.items(), key=lambda item: errors(self.train, item[1]).mean)


def shown_strict(problem: Problem, final: Any) -> float:
    """The share of pictures that are right in every fact."""
    return float(grade(problem.pictures(final), problem.prompts).strict.mean())


def closed_form(name: str, steps: int) -> Bench:
    """A model in closed form, with analytic first steps allowed."""
    train, validation, fresh = problems(name, SIZES[name])
    mean = tuple(train.reference.mean(axis=0).tolist())
    return Bench(train, validation, fresh, ScheduleSpace(steps, LEVELS, NODES, analytic=True, mean=mean))


def shapes(pipe: Any, steps: int, guidance: float, pairs: int, fresh: int) -> Bench:
    """The Shapes model: prompts of the search split to search on and choose by, test prompts to judge."""
    known = prompts(3 * pairs, "search")
    words = (known[:pairs], known[pairs:], prompts(fresh, "test"))
    firsts = (0, 10_000, 20_000)
    found = [on_pairs(pipe, *each, steps, guidance) for each in zip(words, firsts, strict=True)]
    return Bench(*found, ScheduleSpace(steps, found[0].levels, NODES))


def on_pairs(pipe: Any, words: list[str], first: int, steps: int, guidance: float) -> PipelineProblem:
    """The pipeline on some prompts, with seeds that count up from the first one."""
    rollouts = Rollouts(pipe, words, list(range(first, first + len(words))), steps, guidance)
    return PipelineProblem(rollouts, Nodes(kind="name", name="linspace", final="sigma_min"))


def prompts(n: int, split: str) -> list[str]:
    """So many prompts, no two alike."""
    found: dict[str, None] = {}
    while len(found) < n:
        found |= dict.fromkeys(sample_prompts(n, seed=len(found), split=split))
    return list(found)[:n]


def run(
    bench: Bench, method: str, budget: int, seed: int, told: dict[str, Any], storage: Path | None = None
) -> dict[str, Any]:
    """One search: its figures on the fresh pairs and what it cost; gone on with where it is in `storage`."""
    if "statistics" in method:
        with TemporaryDirectory() as folder:
            knowing = replace(bench, space=bench.knowing(Path(folder) / "statistics.safetensors"))
            return run(knowing, method.replace(" + statistics", ""), budget, seed, told, storage)
    refinement = int(REFINEMENT * budget) if method.endswith("refinement") else 0
    began, worked = perf_counter(), process_time()
    found = search_space(
        bench,
        trials=budget - refinement,
        method=searcher(method.partition(" ")[0]),
        metric=parse_metric(told.get("metric", "latent-mse")),
        refinement=refinement,
        seeds=on_statistics(bench.space),
        seed=seed,
        metadata={**told, "method": method, "seed": seed, "statistics": bench.space.statistics is not None},
        storage=storage,
        study_name=f"{method}, seed {seed}, {budget} schedules, {len(bench.space.params)} kinds",
    )
    place = found.schedule.statistics and Path(found.schedule.statistics).name
    kept = {"schedule": replace(found.schedule, statistics=place).to_json()} if refinement else {}
    return {
        **bench.figures(found.schedule),
        "seed": seed,
        "spent": found.spent,
        "schedules": len(found.study.trials),
        "searched": min(train for train, _ in found.finalists),
        "seconds": round(perf_counter() - began),
        "processor seconds": round(process_time() - worked),
        "history": thinned(found.history),
        **kept,
    }


def search_space(
    bench: Bench,
    *,
    metric: Any,
    seeds: Sequence[SolverSchedule],
    metadata: dict[str, Any],
    storage: Path | None,
    study_name: str,
    callbacks: Callbacks | None = None,
    **settings: Any,
) -> SearchResult:
    """Return what the stage "decisions" finds on a bench, in a study that is kept where `storage` says."""
    known = {"evaluations": bench.space.evaluations, "metric": metric.name, "pairs": len(bench.train.prompts)}
    what = (storage, study_name, {**known, **metadata})
    check_study(*what)
    bench.train.loss = loss_of("robust" if metric.aggregate in FORGIVING else "squared", bench.train)
    return run_stages(
        Problems(bench.train, bench.validation), bench.space.evaluations, bench.space.nodes,
        stages=("decisions",), metric=metric, start=seeds, settings=Settings.of(**settings),
        space=bench.space, study=lambda: open_study(*what), callbacks=callbacks,
    )  # fmt: skip


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method: means over the seeds, and the ratio to the best preset."""
    best = result["best preset"]["mean"]
    rows = [
        {"method": f"best preset ({result['best preset']['name']})", **result["best preset"], "ratio": 1.0}
    ]
    for method, runs in result["methods"].items():
        keys = [key for key in ("mean", "median", "p95", "above .1", "strict") if key in runs[0]]
        row = {key: float(np.mean([each[key] for each in runs])) for key in keys}
        spread = [each["mean"] for each in runs]
        rows.append(
            {"method": method, **row, "ratio": row["mean"] / best, "from": min(spread), "to": max(spread)}
        )
    return rows


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """The bars, and whether they are met: the mean over the seeds counts."""
    found: dict[str, bool] = {}
    ratios: dict[str, list[float]] = {"s3": [], "tpe": []}
    for model, result in results.items():
        rows = {row["method"]: row for row in summary(result)}
        for method in ratios:
            if method in rows:
                ratios[method].append(rows[method]["ratio"])
        refined = rows.get("s3 + refinement")
        if refined is None:
            continue
        found[f"{model}: refined at most .5 of the best preset"] = refined["ratio"] <= 0.5
        for figure, bar in BARS.get(model, {}).items():
            found[f"{model}: refined {figure} at most {bar:g}"] = refined[figure] <= bar
        if "at 8" in result:
            at_8 = result["at 8"]["strict"]
            found[f"{model}: strict at least the best preset's at 8"] = refined["strict"] >= at_8
    if all(ratios.values()):
        means = {method: float(np.exp(np.mean(np.log(each)))) for method, each in ratios.items()}
        found["s3 not worse than tpe (geometric mean of the ratios)"] = means["s3"] <= means["tpe"]
    return found


def table(name: str, steps: int, budget: int, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    strict = "strict" in rows[0]
    lines = [
        f"| {name}, {steps} evaluations, {budget} schedules | mean | from, to | median | above .1 | ratio |"
        + (" strict |" if strict else ""),
        "|---|---|---|---|---|---|" + ("---|" if strict else ""),
    ]
    for row in rows:
        span = f"{row['from']:.2e}, {row['to']:.2e}" if "from" in row else ""
        cells = [row["method"], f"{row['mean']:.2e}", span, f"{row['median']:.1e}", f"{row['above .1']:.2%}"]
        cells += [f"{row['ratio']:.2f}"] + ([f"{row['strict']:.1%}"] if strict else [])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches, prints tables and verdicts, writes JSON after every search."""
    given = _parser().parse_args(arguments)
    output_folder(given.json.parent)
    results = kept_results(given.json)
    with Bars(transient=True) as bars:
        task = bars.add_task("", total=len(given.models) * len(given.methods) * given.seeds)

        def say(text: str, done: int) -> None:
            bars.update(task, description=text, advance=done)

        for model in given.models:
            for result in measured(model, given, results.get(model, {}), say):
                results[model] = result
                written(given.json, {"verdicts": verdicts(results), "results": results})
            rows = summary(results[model])
            text = table(model, given.steps, results[model]["budget"], rows)
            bars.console.print(text + "\n", markup=False, soft_wrap=True)
    for bar, met in verdicts(results).items():
        print(f"{'met' if met else 'NOT MET'}: {bar}")


def measured(
    model: str, given: argparse.Namespace, known: dict[str, Any], say: Callable[[str, int], None]
) -> Iterator[dict[str, Any]]:
    """The results of a model, again after every search; known: those that are there already."""
    budget = given.budget or BUDGETS.get(model, BUDGETS["shapes"])
    with ExitStack() as stack:
        bench, told, storage = _bench(model, given, stack)
        if known.get("of") != told or known.get("budget") != budget:
            known = {"of": told, "budget": budget, **_presets(bench, closed=model in MODELS), "methods": {}}
        for method in given.methods:
            runs = known["methods"].setdefault(method, [])
            for seed in range(given.seeds):
                fresh = all(each["seed"] != seed for each in runs)
                say(f"{model}: {method}, seed {seed}", 0)
                if fresh:
                    runs.append(run(bench, method, budget, seed, told, storage))
                say(f"{model}: {method}, seed {seed}", 1)
                yield known


def _presets(bench: Bench, *, closed: bool) -> dict[str, Any]:
    """The best preset's figures; for pipelines also of the one at 8 evaluations."""
    name, preset = bench.best_preset()
    found: dict[str, Any] = {"best preset": {"name": name, **bench.figures(preset)}}
    if not closed:
        name, preset = bench.best_preset(8)
        found["at 8"] = {"name": name, **bench.figures(preset)}
    return found


def _bench(
    model: str, given: argparse.Namespace, stack: ExitStack
) -> tuple[Bench, dict[str, Any], Path | None]:
    """(the model, what it is, where its studies are); a pipeline's outputs are remembered in the stack."""
    if model in MODELS:
        return closed_form(model, given.steps), {"model": model, "steps": given.steps}, None
    pipe = opened(model, given.device)
    bench = shapes(pipe, given.steps, given.guidance, given.pairs, given.fresh)
    stack.enter_context(bench.train.rollouts.remembering())  # type: ignore[attr-defined]
    mark = fingerprint(pipe)
    told = {"model": mark, "steps": given.steps, "guidance_scale": given.guidance}
    told |= {"metric": given.metric, "searched": given.pairs, "fresh": given.fresh}
    return bench, told, output_folder(given.studies) / f"methods-{mark[:8]}.log"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="mixture, digits, shapes, or a folder")
    add("--methods", nargs="+", default=list(METHODS), choices=(*METHODS, *MORE))
    add("--steps", type=int, default=5)
    add("--seeds", type=int, default=3)
    add("--budget", type=int, help="schedules; default: 600, 400 (digits), 300 (Shapes)")
    add("--guidance", type=float, default=5.0, help="of the Shapes model")
    add("--pairs", type=int, default=64, help="of the Shapes model, to search on; twice as many choose")
    add("--fresh", type=int, default=400, help="of the Shapes model, to judge by")
    add("--metric", default="latent-mse:log", help="of the Shapes model, as for diffplug search --for")
    add("--device", default="cpu", help="of the Shapes model")
    add("--studies", type=Path, default=Path("runs") / "studies", help="folder for unfinished studies")
    add("--json", type=Path, default=RESULTS / "search.json")
    return parser


if __name__ == "__main__":
    main()
