"""`tune_schedule`: a schedule whose pictures a reward likes better, by gradients through the pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.files import output_folder, read_json, write_json
from diffplug.rewards import Reward, parse, score
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.descent import Descent
from diffplug.samplers.search.plan import Plan, ends_of, parted, text_digest
from diffplug.samplers.search.problem import PipelineProblem

__all__ = ["Tuned", "tune_schedule"]

FORMAT, VERSION = "schedule-tuning", 1
Progress = Callable[[int, float, float], None]
"""Told after every step: how many are done, the reward of its pictures, the best on the validation pairs."""


@dataclass(frozen=True)
class Figures:
    """Of a schedule on some pairs: mean reward, and mean and median squared error of the final latents."""

    reward: float
    error: float
    median: float


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    schedule: the best one on the validation pairs; the start itself where nothing was better. start, found:
    their figures on the test pairs, which nothing was chosen by. validation: (steps, figures) at every check,
    the start first. seconds: of this process.
    """

    schedule: SolverSchedule
    start: Figures
    found: Figures
    validation: tuple[tuple[int, Figures], ...]
    seconds: float

    @property
    def improved(self) -> bool:
        """Whether the schedule is another one than the start."""
        return self.schedule.meta.get("tuned") is not None


def tune_schedule(
    pipe: Any,
    prompts: Sequence[str],
    schedule: SolverSchedule,
    reward: str | Reward,
    guidance_scale: float | None = None,
    *,
    steps: int = 400,
    batch: int = 16,
    rate: float = 4e-3,
    check_every: int = 25,
    validation: int = 64,
    test: int = 64,
    ceiling: float = 1.0,
    truth_steps: int = 200,
    checkpoints: bool = True,
    options: dict[str, Any] | None = None,
    max_rows: int = 64,
    seed: int = 0,
    cache: Path | None = None,
    storage: str | os.PathLike[str] | None = None,
    on_step: Progress | None = None,
) -> Tuned:
    """Moves the numbers of a schedule up the gradient of a reward; the number of evaluations stays.

    Each step runs the pipeline as it stands on fresh noises, differentiates the reward of the pictures with
    respect to all weights of the schedule and the timesteps that the network is told, and takes a step of
    Adam. Half of the prompts are learned from, a quarter choose among what was passed, a quarter judge.

    Args:
        prompts: three at the least, some hundreds for a result that holds. schedule: where to begin, searched
        or a preset. reward: a spec or a callable (`diffplug.rewards`) with a gradient with respect to its
        pictures. steps, batch, rate: of Adam, see `Descent`. check_every: steps between two looks at the
        validation pairs. ceiling: rewards can be flattered, so that what has more than this many times the
        start's latent error on the validation pairs is not taken. truth_steps: evaluations of the converged
        runs that errors are measured from. checkpoints: save memory, costs a third more time. options:
        further keywords of the pipeline's call. storage: a JSON file to go on from and to keep what was
        reached in, at every check. cache: folder for converged latents.

    A step costs about 3 times (4 with checkpoints) the evaluations of `batch` pictures. Raises ValueError for
    a reward or a pipeline without gradients, settings that cannot be, and a file of another tuning.
    """
    _check(steps=steps, batch=batch, check_every=check_every, validation=validation, test=test)
    if not (np.isfinite(rate) and rate > 0):
        raise ValueError(f"rate={rate}: give a positive learning rate, such as 0.004")
    if not ceiling > 0:
        raise ValueError(f"ceiling={ceiling}: give how many times the start's error is allowed")
    called, label = (parse(reward), reward) if isinstance(reward, str) else (reward, _name(reward))
    nodes = ends_of(pipe, "linspace")
    plan = Plan(pipe, guidance_scale, options or {}, max_rows, seed, nodes, truth_steps, cache)
    words = parted(prompts)
    _check_gradient(called, label, words[0][0], pipe._execution_device)
    train, *others = plan.sets(words, (len(words[0]), validation, test))
    judges = [_Judge(each, called) for each in others]
    told = {
        **plan.told(), "reward": label, "prompts": text_digest(prompts), "first seed": seed,
        "steps": steps, "batch": batch, "rate": rate, "from": schedule.to_json(),
        "validation": validation, "ceiling": ceiling,
    }  # fmt: skip
    descent = Descent(train, schedule, _loss(called, train), steps, batch, rate, seed, checkpoints)
    began = perf_counter()
    work = _Work(descent, judges[0], ceiling, None if storage is None else Path(storage), told)
    work.run(check_every, on_step)
    best = work.best if work.best_at else schedule
    start, found = (judges[1].figures(each) for each in (schedule, best))
    tuned = Tuned(best, start, found, tuple(work.history), round(perf_counter() - began, 1))
    if not work.best_at:
        return tuned
    more = {
        "tuned": {"reward": label, "steps": work.best_at, "batch": batch, "rate": rate, "ceiling": ceiling},
        "before": asdict(start), "test": asdict(found), "pairs": {"validation": validation, "test": test},
        "versions": {each: version(each) for each in ("diffusers", "torch")},
    }  # fmt: skip
    meta = {**plan.told(), "steps": schedule.nfe, "metric": f"reward:{label}", **more}
    return replace(tuned, schedule=replace(best, meta=meta))


@dataclass(frozen=True)
class _Judge:
    """Pairs that a schedule is judged on."""

    problem: PipelineProblem
    reward: Reward

    def figures(self, schedule: SolverSchedule) -> Figures:
        problem, final = self.problem, self.problem.final(schedule)
        off = np.square(final - problem.truth).mean(axis=1)
        rewards = score(self.reward, problem.pictures(final), problem.prompts)
        return Figures(float(rewards.mean()), float(off.mean()), float(np.median(off)))


@dataclass
class _Work:
    """A descent with the best that it has passed through, kept in a file."""

    descent: Descent
    judge: _Judge
    ceiling: float
    path: Path | None
    told: dict[str, Any]

    def __post_init__(self) -> None:
        self.best, self.best_at = self.descent.schedule, 0
        self.history: list[tuple[int, Figures]] = []
        if self.path is not None:
            output_folder(self.path.absolute().parent)
            if self.path.exists():
                self._read(self.path)
        if not self.history:
            self.history = [(0, self.judge.figures(self.best))]

    def run(self, every: int, on_step: Progress | None) -> None:
        """All steps that are left."""
        while self.descent.done < self.descent.steps:
            loss, done = self.descent.step(), self.descent.done
            if done % every == 0 or done == self.descent.steps:
                self._look()
            if on_step is not None:
                on_step(done, -loss, self._best_reward)

    @property
    def _best_reward(self) -> float:
        return next(figures.reward for at, figures in self.history if at == self.best_at)

    def _look(self) -> None:
        """Compare what was reached with the best so far on the validation pairs, and write it down."""
        now = self.descent.now
        figures, start = self.judge.figures(now), self.history[0][1]
        better = figures.reward > self._best_reward and figures.error <= self.ceiling * start.error
        self.history.append((self.descent.done, figures))
        if better:
            self.best, self.best_at = now, self.descent.done
        if self.path is not None:
            write_json(self.path, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "of": self.told,
            "descent": self.descent.state(),
            "best": {"at": self.best_at, "schedule": self.best.to_json()},
            "history": [[at, asdict(figures)] for at, figures in self.history],
        }

    def _read(self, path: Path) -> None:
        known = read_json(path)
        try:
            if (known["format"], known["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {known['format']!r}, version {known['version']!r}")
            other = [name for name, value in self.told.items() if known["of"].get(name) != value]
            if not other:
                self.descent.restore(known["descent"])
                self.best = SolverSchedule.from_json(known["best"]["schedule"])
                self.best_at = int(known["best"]["at"])
                self.history = [(int(at), Figures(**figures)) for at, figures in known["history"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is no unfinished tuning ({error}): name another file, or remove it"
            ) from error
        if other:
            raise ValueError(
                f"the tuning in {str(path)!r} is another one, with another {', '.join(other)}: name another "
                "file, or remove it"
            )


def _loss(reward: Reward, problem: PipelineProblem) -> Callable[[Tensor, list[str]], Tensor]:
    """Less the mean reward of the pictures of latents."""

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        return -score(reward, problem.decoded(latents), prompts, graph=True).mean()

    return loss


def _check_gradient(reward: Reward, label: str, prompt: str, device: Any) -> None:
    """Raise ValueError for a reward that has none, from one grey picture."""
    grey = torch.full((1, 3, 64, 64), 0.5, device=device, requires_grad=True)
    if not score(reward, grey, [prompt], graph=True).requires_grad:
        raise ValueError(
            f"the reward {label!r} has no gradient with respect to its images: tuning needs a "
            "differentiable one, such as clip or shapes-clip; search by others with --metric reward:..."
        )


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: give at least 1")
