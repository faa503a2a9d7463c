"""Students trained under the clock: the firm bars, and a contest of objectives."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.distill.shapes import Row, Test, of_student
from diffplug.training.job import Job
from diffplug.training.train import train

COMMON = [
    "teacher.trajectories=3000", "teacher.filter=shapes:strict", "tuner.kind=full", "tuner.extract=16",
    "run.save_every=100000", "validation.sheet=1", "validation.count=1",
]  # fmt: skip
CONTEST = {
    "trajectory": ("trajectory", []),
    "consistency": (
        "hyper-sd",
        ["objective.source=trajectories", "objective.teacher=base", "objective.p_edge=1"],
    ),
    "tdm": ("tdm", ["optimizer.lr=1e-4"]),
    "one-step": ("one-step", []),
}
DATA_FREE = ("tdm",)  # no trajectories, nothing to filter


class Clock:
    """A job's CPU seconds, trajectories and updates apart; it stops training when they are spent."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.trajectories, self.updates = seconds, 0.0, 0
        self.began = time.process_time()

    def __call__(self, what: str, done: int, total: int, figures: Any) -> None:
        if what == "trajectories":
            self.trajectories = time.process_time() - self.began
        else:
            self.updates = done


def run(method: str, changes: list[str], folder: Path, cache: Path) -> tuple[Path, Clock]:
    """Train by a method and return the student's folder and the CPU seconds that it took."""
    clock = Clock(0.0)
    job = Job.read(method, None, [*COMMON, *changes], cache=cache)
    done = train(job, folder, on_progress=clock)
    clock.seconds = time.process_time() - clock.began
    assert done.student is not None  # noqa: S101
    return done.student, clock


def bars(pipe: Any, test: Test, folder: Path, cache: Path) -> list[tuple[Row, float]]:
    """Train students for 4 evaluations, from it for 2 and for 1, and one for 8.

    Returns the rows with the CPU seconds of everything that a student needed, trajectories included.
    """
    found: list[tuple[Row, float]] = []
    plan = [("4", 4, 400, None), ("2", 2, 300, "4"), ("1", 1, 300, "4"), ("8", 8, 160, None)]
    spent, store = {"": 0.0}, 0.0
    for name, steps, updates, start in plan:
        begun = [f"student.start={folder / start / 'student'}"] if start else []
        changes = [f"student.steps={steps}", f"run.updates={updates}", *begun]
        student, clock = run("trajectory", changes, folder / name, cache)
        store = store or clock.trajectories
        spent[name] = clock.seconds + (spent[start] if start else store - clock.trajectories)
        found.append((of_student(pipe, student, steps, test), spent[name]))
        if steps > 1:
            found.append((of_student(pipe, student, steps, test, eta=1.0), spent[name]))
    return found


def keeping(pipe: Any, test: Test, folder: Path, cache: Path) -> list[tuple[Row, float]]:
    """Train a student for 4 evaluations that keeps guidance, and return its row and one drawn with eta 1."""
    changes = ["student.steps=4", "student.guidance=5.0", "teacher.keep=0", "run.updates=400"]
    student, clock = run("trajectory", changes, folder / "keeping", cache)
    rows = [of_student(pipe, student, 4, test, eta=eta) for eta in (0.0, 1.0)]
    return [(replace(r, name=f"{r.name}, guided", rows=8), clock.seconds) for r in rows]


def contest(
    pipe: Any,
    test: Test,
    folder: Path,
    cache: Path,
    *,
    seconds: float,
    seeds: int,
    steps: list[int],
    known: Collection[tuple[Any, ...]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield every objective's row at equal CPU seconds, with right trajectories only and with all.

    known: the cells (steps, objective, filtered, seed) that are passed over.
    """
    for k, name in itertools.product(steps, CONTEST):
        method, extra = CONTEST[name]
        which = (True,) if name in DATA_FREE else (True, False)
        cells = [c for c in itertools.product(which, range(seeds)) if (k, name, *c) not in known]
        if not cells or (name == "one-step" and k != 1):
            continue
        updates = _updates(method, extra, k, folder, cache, seconds)
        for filtered, seed in cells:
            place = folder / f"{name}-{k}-{'right' if filtered else 'all'}-{seed}"
            changes = [f"student.steps={k}", f"run.updates={updates}", f"run.seed={seed}"]
            changes += [*_segments(method, k), *([] if filtered else ["teacher.keep=0"]), *extra]
            student, _ = run(method, changes, place, cache)
            made = of_student(pipe, student, k, test)
            cell = {"steps": k, "objective": name, "filtered": filtered, "seed": seed}
            yield {**cell, "updates": updates, **vars(made)}


def _segments(method: str, k: int) -> list[str]:
    return [f"objective.segments=[{k}]"] if method == "hyper-sd" else []


def _updates(method: str, extra: list[str], k: int, folder: Path, cache: Path, seconds: float) -> int:
    """Return how many updates fit into so many CPU seconds, from ten that are timed."""
    changes = [f"student.steps={k}", "run.updates=12", *_segments(method, k), *extra]
    times: list[float] = []

    def note(what: str, done: int, total: int, figures: Any) -> None:
        times.append(time.process_time())

    job = Job.read(method, None, [*COMMON, *changes], cache=cache)
    train(job, folder / f"timing-{method}-{k}-{time.monotonic_ns()}", on_progress=note)
    return max(20, int(seconds / ((times[-1] - times[-9]) / 8)))


def overhead(cache: Path, folder: Path, updates: int = 30) -> dict[str, float]:
    """Return the share of an update that is neither the network's nor AdamW's."""
    job = Job.read("trajectory", None, [*COMMON, f"run.updates={updates}"], cache=cache)
    inside, total = 0.0, []
    forward, backward, step = _timers()

    def timed(call: Any) -> Any:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                inside += time.process_time() - began

        return wrapper

    def note(what: str, done: int, of: int, figures: Any) -> None:
        if what == "updates":
            total.append((time.process_time(), inside))

    try:
        for owner, name, original in (forward, backward, step):
            setattr(owner, name, timed(original))
        train(job, folder, on_progress=note)
    finally:
        for owner, name, original in (forward, backward, step):
            setattr(owner, name, original)
    (t0, i0), (t1, i1) = total[4], total[-1]
    return {"update_seconds": (t1 - t0) / (len(total) - 5), "outside": 1 - (i1 - i0) / (t1 - t0)}


def _timers() -> list[tuple[Any, str, Any]]:
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel

    owners = [(UNet2DConditionModel, "forward"), (Accelerator, "backward"), (torch.optim.AdamW, "step")]
    return [(owner, name, getattr(owner, name)) for owner, name in owners]
