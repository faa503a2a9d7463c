"""A job, from the teacher's trajectories to the folder that is handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import output_folder, write_json
from diffplug.training.checkpoint import Checkpoints, take_up
from diffplug.training.conditions import one_denoiser
from diffplug.training.data import DataSettings, prompts_of
from diffplug.training.job import Job
from diffplug.training.output import write_card, write_student
from diffplug.training.precision import autocast
from diffplug.training.trainer import Trainer
from diffplug.training.validation import Figures, validate

__all__ = ["Trained", "train"]

Progress = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """What a run has come to. student: its folder, None where the run stopped before the end."""

    student: Path | None
    updates: int
    figures: Figures | None
    seconds: float
    recipe: Any = None


def _silent(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    pass


def train(
    job: Job,
    folder: Path,
    *,
    resume: bool | None = None,
    minutes: float | None = None,
    on_progress: Progress = _silent,
) -> Trained:
    """Run a job in `folder` to its end, or for so many minutes, and return what it has come to.

    resume: as in `Trainer`. on_progress: told (what is done, how much, of how much, figures). Everything is
    taken up where an earlier call stopped: trajectories, updates, stages. Raises ValueError and WriteError in
    one line before the work where something does not go together.
    """
    own = getattr(job.method, "run", None)  # a method whose output is no student, such as an adapter
    run: Callable[..., Trained] = _run if own is None else own
    with _no_trace_of_a_refusal(folder):
        return run(job, folder, resume=resume, minutes=minutes, on_progress=on_progress)


def _run(
    job: Job, folder: Path, *, resume: bool | None, minutes: float | None, on_progress: Progress
) -> Trained:
    """Run a job that ends in a student."""
    began = time.monotonic()
    deadline = None if minutes is None else began + 60 * minutes
    stages = job.method.stages(job) if hasattr(job.method, "stages") else 1
    places = [folder / f"stage-{stage + 1}" for stage in range(stages)] if stages > 1 else [folder]
    take_up(Checkpoints(places[0] / "checkpoints"), resume, job.mapping())
    _check(job)
    output_folder(folder)
    if getattr(job.method, "needs_store", lambda job: False)(job):
        _fill(job, on_progress)
    figures: Figures | None = None
    row: Any = None
    for stage, place in enumerate(places):
        left = None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)
        result = _stage(job, stage, place, resume if stage == 0 else None, left, on_progress)
        if result is None:
            return Trained(None, _updates(place), None, time.monotonic() - began)
        figures, row = result
    seconds = time.monotonic() - began
    if _main():
        write_card(job, row, figures, seconds, place / "student")
    return Trained(place / "student", _updates(place), figures, seconds, row)


@contextmanager
def _no_trace_of_a_refusal(folder: Path) -> Iterator[None]:
    """A block that takes the folders that it made away again, where it fails and has put nothing in them."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):  # something is in it
                place.rmdir()
        raise


def _stage(
    job: Job, stage: int, place: Path, resume: bool | None, minutes: float | None, on_progress: Progress
) -> tuple[Figures | None, Any] | None:
    """Train one stage and write its student; None where the time was over before its end."""
    objective = job.method.from_job(job) if stage == 0 else job.method.from_job(job, stage)
    run, denoiser = job.config.run, one_denoiser(job.pipe)
    dtype = torch.bfloat16 if run.precision == "bf16" else None
    name = "updates" if place.name[:6] != "stage-" else place.name

    def told(update: int, figures: Mapping[str, float]) -> None:
        on_progress(name, update + 1, run.updates, figures)

    def saved(update: int, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        with _whole(job), job.network.holding(weights["student"]):
            _validated(job, place / "sheets" / f"update-{update:06d}.png", scored=False)

    with autocast(denoiser, dtype), _checkpointing(denoiser, run.gradient_checkpointing):
        trainer = Trainer(
            objective,
            run,
            job.config.optimizer,
            folder=place,
            config=job.mapping(),
            resume=resume,
            minutes=minutes,
            cpu=job.device == "cpu",
            on_update=told,
            on_save=saved if job.config.validation.sheet else None,
        )
        if hasattr(job.method, "tuner_of"):
            _before(job, place / "sheets" / "update-000000.png")
        with _resting(job):
            result = trainer.run()
        if result.stopped:
            return None
        weights = result.weights["student"]
        job.network.put(weights)
        job.previous = weights
        if not _main():
            return None, None
        figures = _validated(job, place / "student" / "sheet.png", scored=True)
    row = write_student(job, weights, place / "student", updates=result.updates)
    write_json(place / "config.json", job.mapping())
    return figures, row


def _before(job: Job, sheet: Path) -> None:
    """Draw the model that is tuned, as the later sheets will be drawn."""
    if job.config.validation.sheet and _main() and not sheet.exists():
        _validated(job, sheet, scored=False)


def _validated(job: Job, sheet: Path, *, scored: bool) -> Figures | None:
    told = job.config.validation
    output_folder(sheet.parent)
    if told.prompts is None:
        first = job.prompts[: max(told.count, told.sheet)]
        prompts = [prompt for prompt in first if prompt] or first
    else:
        data = DataSettings(prompts=told.prompts, count=max(told.count, told.sheet))
        prompts = prompts_of(data, job.pipe)
    if not scored:
        from dataclasses import replace

        told = replace(told, reward=None)
    return validate(job.pipe, job.sampling(), prompts, told, call=job.call, sheet=sheet)


def _check(job: Job) -> None:
    """Raise ValueError for what would only be noticed after the teacher's work."""
    check = getattr(job.method, "check", None)
    teacher, student = job.config.teacher, job.config.student
    job.check()
    if teacher.steps % student.steps and getattr(job.method, "needs_store", lambda job: False)(job):
        raise ValueError(
            f"teacher.steps is {teacher.steps}, which student.steps {student.steps} does not divide: take a "
            f"multiple, as {-(-teacher.steps // student.steps) * student.steps}"
        )
    if teacher.guidance is not None and teacher.guidance > 1 and student.guidance is None:
        _check_guides(job)
    if check is not None:
        check(job)


def _check_guides(job: Job) -> None:
    import inspect

    if "guidance_scale" not in inspect.signature(job.pipe.__call__).parameters:
        raise ValueError(
            f"teacher.guidance is {job.config.teacher.guidance:g}, and {type(job.pipe).__name__} has no "
            f"guidance: leave it out by teacher.guidance=1"
        )


def _fill(job: Job, on_progress: Progress) -> None:
    """Make the trajectories that are missing, shared by all processes."""
    from accelerate import PartialState

    state = PartialState(cpu=job.device == "cpu")
    count, done = job.config.teacher.trajectories, 0

    def more(n: int) -> None:
        nonlocal done
        done += n * state.num_processes
        on_progress("trajectories", min(done, count), count, {})

    job.store.fill(count, rank=state.process_index, processes=state.num_processes, on_part=more)
    state.wait_for_everyone()
    if job.config.teacher.filter is not None:
        with state.main_process_first():
            job.store.keep_right(job.config.teacher.filter, job.config.teacher.keep, count)


def _updates(place: Path) -> int:
    saved = Checkpoints(place / "checkpoints").newest()
    return saved.update if saved else 0


def _main() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@contextmanager
def _resting(job: Job) -> Iterator[None]:
    """A block in which all parts but the denoiser wait on the CPU, where a method has no use for them."""
    _move_others(job, "cpu")
    try:
        yield
    finally:
        _move_others(job, job.device)


@contextmanager
def _whole(job: Job) -> Iterator[None]:
    """A block inside `_resting` in which the pipeline is whole again."""
    _move_others(job, job.device)
    try:
        yield
    finally:
        _move_others(job, "cpu")


def _move_others(job: Job, device: str) -> None:
    """Move text encoders and autoencoder; not on a CPU, nor where a method needs them (needs_pipe)."""
    if job.device == "cpu" or getattr(job.method, "needs_pipe", False):
        return
    for part in job.pipe.components.values():
        if isinstance(part, torch.nn.Module) and part is not one_denoiser(job.pipe):
            part.to(device)


@contextmanager
def _checkpointing(denoiser: Any, wanted: bool) -> Iterator[None]:
    """A block in which activations are computed again on the way back (arXiv 1604.06174)."""
    if not wanted:
        yield
        return
    if not hasattr(denoiser, "enable_gradient_checkpointing"):
        raise ValueError(f"{type(denoiser).__name__} has no gradient checkpointing: leave it out")
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
