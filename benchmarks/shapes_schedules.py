"""Searches the solvers that ship with the Shapes model, and fits the polynomial: run again for new weights.

    python -m benchmarks.shapes_schedules

For every number of steps: the best solver that all stages find at guidance 5 (`solver-*.json`), and the
ratios of DC-Solver on the method's own recipe at several guidance scales (`ratios-*.json`), to which
`polynomial.json` is fitted. Prompts are those of the search split only; half of the pairs judge. What is not
better than the stock solver is not shipped. The loss is the robust one: with few steps many of these pictures
get another layout than the converged one has. Prints held-out errors and writes them as JSON.

Takes hours. What is finished is kept in a folder of --work that is named by model and settings, and a second
run goes on from there; shipped files are replaced at the very end. Several processes may search at once, each
with its own --steps, --stages and --only-search; a last one without these collects what they found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.command import command, opened
from diffplug.files import output_folder, read_json, write_json
from diffplug.rollout import Rollouts
from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.library import shipped_folder
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.fits import ratios
from diffplug.samplers.search.parameters import with_ratios
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.problem import LOSSES, errors, loss_of
from diffplug.samplers.search.search import search_compensation
from diffplug.samplers.search.stages import FITS
from diffplug.shapes import sample_prompts

RESULTS = Path(__file__).parent / "results"
NODES = Nodes(kind="name", name="linspace", final="sigma_min")
SHIPPED = ("ratios-*.json", "solver-*.json", "polynomial.json")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What one search came to: a file to ship, or None, and rows of the table."""

    file: dict[str, Any] | None
    rows: list[dict[str, Any]]


@dataclass
class Workshop:
    """The pipeline and its pairs: half to fit to, half to judge by."""

    pipe: Any
    pairs: int
    truth: int
    loss: str
    cache: Path | None

    def __post_init__(self) -> None:
        self.origin = {"model": fingerprint(self.pipe), "architecture": architecture(self.pipe)}
        self.prompts = sample_prompts(self.pairs, seed=0, split="search")

    def problems(self, guidance: float) -> tuple[PipelineProblem, PipelineProblem]:
        """Pairs to fit to and to judge by, which share what the network said."""
        half = self.pairs // 2
        parts = [(self.prompts[:half], range(half)), (self.prompts[half:], range(half, self.pairs))]
        rollouts = [Rollouts(self.pipe, prompts, list(seeds), 4, guidance) for prompts, seeds in parts]
        rollouts[1].network_cache = rollouts[0].network_cache
        train, judge = (PipelineProblem(each, NODES, self.truth, self.cache) for each in rollouts)
        train.loss = judge.loss = loss_of(self.loss, train)
        return train, judge

    def ratios(self, steps: int, guidance: float) -> Found:
        """DC-Solver's ratios on the method's recipe; neutral where that is better."""
        train, judge = self.problems(guidance)
        plain, began = unipc(steps, NODES, disable_corrector=(0,)), perf_counter()
        with train.rollouts.remembering() as run:
            judge.rollouts.network_cache = run.network_cache
            seen = [plain]
            ratios(train, plain, watch=seen.append)
            stock, best = errors(judge, plain), min(seen, key=lambda each: errors(judge, each).mean_loss)
            reached = errors(judge, best)
            if reached.mean > stock.mean or reached.p95 > stock.p95:
                best, reached = plain, stock
            figures = {"baseline": stock.figures(), "held out": reached.figures()}
            cost = {"evaluations": run.network_cache.evaluated, "seconds": round(perf_counter() - began, 1)}
        row = {"steps": steps, "guidance_scale": guidance, "stage": "ratios", **figures, **cost}
        meta = {**self.origin, **row, "truth_steps": self.truth, "pairs": self.pairs, "loss": self.loss}
        return Found(replace(best, meta=meta).to_json(), [{"kind": "ratios", **row}])

    def polynomial(self, searched: Mapping[tuple[int, float], Sequence[float]]) -> Found:
        """The polynomial through the ratios, with its own held-out errors."""
        fitted, rows = CompensationPolynomial.fit(searched), []
        for guidance in sorted({scale for _, scale in searched}):
            judge = self.problems(guidance)[1]
            for steps in sorted({count for count, _ in searched}):
                plain = unipc(steps, NODES, disable_corrector=(0,))
                curve = with_ratios(plain, dict(enumerate(fitted.ratios(steps, guidance))))
                told = {
                    "steps": steps,
                    "guidance_scale": guidance,
                    "held out": errors(judge, curve).figures(),
                }
                rows.append({"kind": "polynomial", **told, "baseline": errors(judge, plain).figures()})
        return Found(replace(fitted, meta=self.origin).to_json(), rows)

    def solver(self, steps: int, guidance: float, stages: Sequence[str], say: Say) -> Found:
        """Return the best solver of all stages; no file where it does not beat the stock solvers."""
        found = search_compensation(
            self.pipe, self.prompts, steps, guidance, rungs=stages, loss=self.loss,
            truth_steps=self.truth, cache=self.cache, on_stage=lambda stage: say(f"solver-{steps}: {stage}"),
        )  # fmt: skip
        meta = found.schedule.meta
        row = {"kind": "solver", **{name: meta[name] for name in ("steps", "guidance_scale", "seconds")}}
        row |= {"stage": meta["stage"], "baseline": meta["baseline"]["validation"]}
        row |= {"held out": found.validation, "evaluations": meta["network calls"]}
        return Found(found.schedule.to_json() if found.improved else None, [row])


class Unfinished:
    """Finished searches of an unfinished run, a file each; the folder is named by what they depend on."""

    def __init__(self, root: Path, **depends: Any) -> None:
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = output_folder(root / f"shapes-schedules-{name}")

    def kept(self, name: str, search: Callable[[], Found]) -> Found:
        """What `search` gives, from the file of that name where it was finished before."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return Found(**read_json(path))
        found = search()
        write_json(path, vars(found))
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def searches(
    work: Workshop, told: argparse.Namespace, unfinished: Unfinished, say: Say
) -> Iterator[tuple[str, Found]]:
    """Every file to ship by its name, as it is found: ratios, their polynomial, solvers."""
    searched: dict[tuple[int, float], Sequence[float]] = {}
    for guidance in told.guidances:
        for steps in told.steps:
            name = f"ratios-{steps}-{guidance:g}"
            say(name)
            found = unfinished.kept(name, partial(work.ratios, steps, guidance))
            searched[steps, guidance] = SolverSchedule.from_json(found.file).ratios
            yield name, found
    if not told.only_search:
        say("polynomial")
        of = hashlib.sha256(repr(sorted(searched.items())).encode()).hexdigest()[:8]
        yield "polynomial", unfinished.kept(f"polynomial-{of}", partial(work.polynomial, searched))
    for steps in told.steps:
        search = partial(work.solver, steps, told.guidance, told.stages, say)
        yield f"solver-{steps}", unfinished.kept(f"solver-{steps}", search)


def publish(files: Mapping[str, dict[str, Any]], folder: Path, model: str) -> None:
    """Put the new files in place one by one, and only then take away those of other weights.

    A schedule that `benchmarks.shapes_s3` has put in the place of a solver for the same weights stays.
    """
    for name, document in files.items():
        path = folder / f"{name}.json"
        old = _meta(path)
        if not (old.get("method") == "s3" and old.get("model") == model):
            write_json(path, document)
    for pattern in SHIPPED:
        for path in folder.glob(pattern):
            if path.stem not in files and _meta(path).get("model") != model:
                path.unlink()


def _meta(path: Path) -> dict[str, Any]:
    """What a shipped file says about where it comes from; nothing where it cannot be read."""
    try:
        document = read_json(path) if path.exists() else {}
    except ValueError:
        return {}
    return dict(document.get("meta", {})) if isinstance(document, dict) else {}


def table(told: Sequence[dict[str, Any]]) -> str:
    """Markdown: held-out errors before and after."""
    lines = [
        "| what | steps | guidance | stock | searched | ratio | of medians | evaluations | seconds |",
        f"|{'---|' * 9}",
    ]
    for row in told:
        before, after = row["baseline"]["mean"], row["held out"]["mean"]
        medians = row["baseline"]["median"], row["held out"]["median"]
        cells = [row["kind"], str(row["steps"]), f"{row['guidance_scale']:g}", f"{before:.2e}"]
        cells += [f"{after:.2e}", f"{after / before:.2f}", f"{medians[1] / medians[0]:.2f}"]
        cells += [str(row.get("evaluations", "")), f"{row.get('seconds', 0):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, searches what is not found yet, ships the files and prints the table."""
    told = _parser().parse_args(arguments)
    folder, figures = output_folder(told.out), output_folder(told.json.parent) / told.json.name
    work = Workshop(opened(told.model, told.device), told.pairs, told.truth, told.loss, told.cache)
    setting = {name: getattr(told, name) for name in ("pairs", "truth", "guidance", "loss")}
    unfinished = Unfinished(told.work, **work.origin, **setting)
    files, rows = {}, []
    with Progress(transient=True) as bars:
        task = bars.add_task("", total=len(told.steps) * (1 + len(told.guidances)) + 1)
        for name, found in searches(work, told, unfinished, lambda s: bars.update(task, description=s)):
            rows += found.rows
            if found.file is not None:
                files[name] = found.file
            bars.advance(task)
    print(table(rows))
    if told.only_search:
        return
    write_json(figures, {"setting": setting, "results": rows})
    publish(files, folder, work.origin["model"])
    unfinished.remove()


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="shapes")
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[5, 6, 8, 10])
    add("--guidance", type=float, default=5.0, help="of the solvers")
    add(
        "--guidances", type=float, nargs="+", default=[3.0, 5.0, 7.5], help="of the ratios and the polynomial"
    )
    add("--pairs", type=int, default=128, help="of prompt and noise: half to fit to, half to judge by")
    add("--truth", type=int, default=200, help="evaluations of the converged result")
    add("--loss", default="robust", choices=LOSSES, help="what the searches make small")
    add("--stages", nargs="+", default=list(FITS), choices=FITS)
    add("--out", type=Path, default=shipped_folder("shapes"), help="folder to ship to, at the end")
    add("--work", type=Path, default=Path("runs"), help="where finished searches wait for the end")
    add("--only-search", action="store_true", help="ship nothing yet: several runs may share the steps")
    add("--cache", type=Path, help="folder for converged latents and unfinished searches")
    add("--json", type=Path, default=RESULTS / "shapes_schedules.json")
    return parser


if __name__ == "__main__":
    main()
