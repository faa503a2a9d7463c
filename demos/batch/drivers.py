"""Who calls the worker: this process, several processes of this machine, or the actors of a Ray cluster.

All of them do the same idempotent thing, a shard at a time; leases keep them out of each other's way, and
machines that share a folder need not know of each other.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from diffplug.demos.batch.failures import TooManyFailures
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.plan import Shard
from diffplug.demos.batch.render import Outcome, RefusedRecipes, Tell, Worker
from diffplug.demos.batch.work import sweep
from diffplug.recipe import Recipe

__all__ = ["Stopped", "loop", "run", "unfinished"]

_PAUSE = 0.5


class Stopped(Exception):
    """The batch cannot go on in this environment; the message says why. Nothing that is finished is lost."""


def _silent(kind: str, n: int, of: int) -> None:
    """Tell nobody."""


def unfinished(job: Job, shards: Sequence[Shard]) -> tuple[list[Shard], int, int]:
    """Return the shards with pictures to make, how many pictures these are, and how many are there."""
    from diffplug.demos.batch.failures import Failures
    from diffplug.demos.batch.store import store

    finished, failures = store(job.folder, job.layout), Failures(job)
    finished.refresh()
    if job.work.is_dir():
        sweep(job.work, finished)
    todo, missing, there = [], 0, 0
    for shard in shards:
        absent = [picture.id for picture in shard.pictures if picture.id not in finished.done]
        there += len(shard.pictures) - len(absent)
        absent = list(set(absent) - failures.passed(shard.key)) if absent else []
        missing += len(absent)
        if absent:
            todo.append(shard)
    return todo, missing, there


def run(
    job: Job,
    model: Any,
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    *,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    tell: Tell = _silent,
) -> list[Outcome]:
    """Return what was done for every shard, once all are finished.

    workers: processes of this machine, each with its own copy of the model. rank, world: which of several
    starters this one is; it begins at its place in the list, and those above 0 do not wait for the others.
    Raises Stopped where the environment makes it impossible to go on, and RefusedRecipes for what the
    pipeline does not take.
    """
    if workers > 1:
        return list(_local(job, model, shards, recipes, workers, tell))
    worker = Worker(job, model, recipes, rank=rank, tell=tell)
    start = len(shards) * rank // max(1, world)
    return list(loop(worker, [*shards[start:], *shards[:start]], waits=rank == 0))


def loop(
    worker: Callable[[Shard], Outcome | None], shards: Sequence[Shard], *, waits: bool = True
) -> Iterator[Outcome]:
    """Yield what a worker did, shard by shard; those that others are at come last.

    waits: come back until they are finished, for the others may die. Raises Stopped.
    """
    left = list(shards)
    while left:
        busy = []
        for shard in left:
            try:
                outcome = worker(shard)
            except TooManyFailures as error:
                raise Stopped(str(error)) from error
            except OSError as error:
                raise Stopped(f"{error}") from error
            if outcome is None:
                busy.append(shard)
            else:
                yield outcome
        if not waits:
            return
        if len(busy) == len(left):
            time.sleep(_PAUSE)
        left = busy


@dataclass(frozen=True)
class _Order:
    """What a process of its own needs to know."""

    job: Job
    model: Any
    recipes: Sequence[Recipe]
    shards: Sequence[Shard]
    rank: int
    world: int


def _local(
    job: Job, model: Any, shards: Sequence[Shard], recipes: Sequence[Recipe], workers: int, tell: Tell
) -> Iterator[Outcome]:
    """Yield what several processes did; when some die, the others take over."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    for rank in range(workers):
        here, there = context.Pipe(duplex=False)
        order = _Order(job, model, recipes, shards, rank, workers)
        process = context.Process(target=_serve, args=(order, there), daemon=False)
        process.start()
        there.close()
        processes[here] = process
    ended: list[str] = []
    try:
        yield from _listen(processes, tell, ended)
    finally:
        for process in processes.values():
            process.terminate()  # they park their work
        for process in processes.values():
            process.join()
    early = [message or "it was killed" for message in ended if message]
    if len(early) < len(ended):
        if early:
            warnings.warn(
                f"{len(early)} of {workers} workers ended early, the others did their share: {early[0]}",
                stacklevel=2,
            )
        return
    raise Stopped(f"all {workers} workers ended early: {next(iter(early), 'they were killed')}")


def _listen(processes: dict[Connection, Any], tell: Tell, ended: list[str]) -> Iterator[Outcome]:
    """Yield the outcomes that come in until every process has ended; `ended` learns how they did."""
    while processes:
        for line in wait(list(processes)):
            assert isinstance(line, Connection)  # noqa: S101
            try:
                message = line.recv()
            except (EOFError, OSError):
                processes.pop(line).join()
                ended.append("killed")
                continue
            if isinstance(message, Outcome):
                yield message
            elif isinstance(message, RefusedRecipes):
                raise message
            elif isinstance(message, str):
                processes.pop(line).join()
                ended.append(message)
                if message.startswith("stop: "):
                    raise Stopped(message.removeprefix("stop: "))
            else:
                tell(*message)


def _serve(order: _Order, line: Connection) -> None:
    """Make shards in a process of its own; end with the text of what went wrong, or an empty one."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    said: str | RefusedRecipes = ""
    try:
        tell = lambda kind, n, of: line.send((kind, n, of))  # noqa: E731
        worker = Worker(order.job, order.model, order.recipes, rank=order.rank, tell=tell)
        start = len(order.shards) * order.rank // order.world
        for outcome in loop(worker, [*order.shards[start:], *order.shards[:start]]):
            line.send(outcome)
    except Stopped as error:
        said = f"stop: {error}"
    except KeyboardInterrupt:
        said = "it was interrupted"
    except RefusedRecipes as error:
        said = error
    except Exception as error:  # the others may do better
        said = f"{type(error).__name__}: {error}"
    with suppress(OSError, KeyboardInterrupt):  # the starter may be gone, or be ending this process
        line.send(said)
