"""One shard: made, resumed or found finished, with the same bytes whatever happened before."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import BoundedSemaphore
from time import perf_counter
from typing import Any

from diffplug import rewards
from diffplug.demos.batch.failures import Failures
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.lease import Lease
from diffplug.demos.batch.model import Model
from diffplug.demos.batch.plan import Picture, Shard, digest
from diffplug.demos.batch.store import store
from diffplug.demos.batch.work import Work
from diffplug.making import Row, versions
from diffplug.making.png import png_bytes
from diffplug.messages import reason
from diffplug.network.prompt_encodings import PromptEncodings
from diffplug.recipe import Recipe
from diffplug.recipe.batches import Batch, batches
from diffplug.registry import name_sampler

__all__ = ["Outcome", "Worker"]

Tell = Callable[[str, int, int], None]
_WAITING = 4
"""Batches that may wait for the disk: a slow one slows the network, it does not fill the memory."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass
class Outcome:
    """What a worker did for a shard. redone: pictures of its batches that were on the disk before."""

    key: str
    made: int = 0
    failed: int = 0
    seconds: float = 0.0
    evaluations: float = 0.0
    calls: dict[int, int] = field(default_factory=dict)
    first: bool = True
    host: str = field(default_factory=socket.gethostname)


class RefusedRecipes(ValueError):
    """What the pipeline does not take: `problems`, each a recipe and what is wrong with it."""

    def __init__(self, problems: list[tuple[Recipe, str]]) -> None:
        self.problems = problems
        super().__init__(problems)  # as pickle gives it back

    def __str__(self) -> str:
        return "; ".join(text for _, text in self.problems[:3])


class Worker:
    """Makes shards, one call each; the model is loaded when the first one needs it.

    recipes: what the pipeline is asked whether it takes, before the first picture. tell: told ("made", n, 0),
    ("failed", n, 0) and ("step", done, of).
    """

    def __init__(
        self,
        job: Job,
        model: Model | Any,
        recipes: Sequence[Recipe] = (),
        *,
        rank: int = 0,
        tell: Tell = lambda kind, n, of: None,
    ) -> None:
        self.job, self.model, self.recipes, self.rank, self.tell = job, model, recipes, rank, tell
        for name, file in job.samplers.items():  # in a process of its own nobody knows them yet
            name_sampler(name, file)
        self.store = store(job.folder, job.layout)
        self.failures = Failures(job)
        self.setup = model.setup()
        self._rows: dict[int, int] = {}
        self._encodings, self._recipe = PromptEncodings(), Recipe()
        self._pipe: Any = None
        self._held: list[Any] = []

    def __call__(self, shard: Shard) -> Outcome | None:
        """Return what was done for a shard; None where another process is at it.

        Raises TooManyFailures where it is the set-up that fails, and OSError where the disk refuses.
        """
        lease = Lease(self.job.work, shard.key, self.job.life)
        if not lease.take():
            return None
        start = perf_counter()
        with lease.kept():
            self.store.refresh()
            missing = self.missing(shard)
            key = digest([picture.id for picture in missing])
            if not missing or self.store.holds(key):
                return Outcome(shard.key)
            part = replace(shard, pictures=tuple(missing))
            outcome = self._make(part, shard.key, key, Work.open(self.job.work, key, lease))
        outcome.seconds = perf_counter() - start
        return outcome

    def missing(self, shard: Shard) -> list[Picture]:
        """Return the pictures of a shard that are nowhere in the folder and are to be tried."""
        passed = self.failures.passed(shard.key)
        return [one for one in shard.pictures if one.id not in self.store.done and one.id not in passed]

    def _load(self) -> None:
        """Load the pipeline for the first shard, and ask it about every recipe."""
        if self._pipe is None:
            pipe = self.model.load(self.rank)
            self._check(pipe)
            self._held = [rewards.get(recipe.reward) for recipe in self.recipes if recipe.steer]
            self._pipe = pipe

    def _check(self, pipe: Any) -> None:
        """Raise RefusedRecipes for what the pipeline does not take."""
        problems = []
        for recipe in self.recipes:
            try:
                recipe.check(pipe)
            except ValueError as error:
                problems.append((recipe, str(error)))
        if problems:
            raise RefusedRecipes(problems)

    def _make(self, shard: Shard, cut: str, key: str, work: Work) -> Outcome:
        outcome = Outcome(cut)
        try:
            records = work.finished
            if records is None:
                self._render(shard, work, outcome)
                records, failed = work.gather()
                outcome.failed = len(failed)
                self.failures.write(cut, failed)
            outcome.first = work.finish(self.store, key, records)
        except FileNotFoundError:
            if work.path.exists():
                raise
            outcome.first = False  # this process was thought dead, and another one goes on with its work
        except BaseException:
            work.park()
            raise
        return outcome

    def _render(self, shard: Shard, work: Work, outcome: Outcome) -> None:
        size = max(1, self.job.max_rows // shard.recipe.copies)
        self._load()
        if shard.recipe != self._recipe:  # it may bring adapters of the text encoders
            self._encodings.clear()
            self._recipe = shard.recipe
        with self._encodings.on(self._pipe), _Saver() as saver:
            for first in range(0, len(shard.pictures), size):
                part = shard.pictures[first : first + size]
                if work.batch(first, self.job.run) is not None:
                    self.tell("found", len(part), 0)
                    continue
                made = list(self._tried(shard.recipe, part, outcome))
                saver.put(self._write, work, first, shard.recipe, made)
                bad = sum(isinstance(one, _Failed) for one in made)
                outcome.made += len(part) - bad
                self.tell("made", len(part) - bad, 0)
                self.tell("failed", bad, 0)

    def _tried(self, recipe: Recipe, part: Sequence[Picture], outcome: Outcome) -> Iterator[Any]:
        """Yield what became of every picture of a batch; one that fails does not spoil the others."""
        try:
            yield from self._called(recipe, part, outcome)
            self.failures.went_well(len(part))
            return
        except OSError as error:
            if error.errno in _FULL:
                raise
            told: BaseException = error
        except Exception as error:
            told = error
        message, kind = reason(told), type(told).__name__
        del told  # and with it the frames that hold tensors
        if len(part) > 1:
            half = len(part) // 2
            yield from self._tried(recipe, part[:half], outcome)
            yield from self._tried(recipe, part[half:], outcome)
            return
        try:
            yield from self._called(recipe, part, outcome)  # once more: it may have been the machine
            self.failures.went_well(1)
        except OSError as error:
            if error.errno in _FULL:
                raise
            yield self._failed(part[0], kind, message)
        except Exception:
            yield self._failed(part[0], kind, message)

    def _called(self, recipe: Recipe, part: Sequence[Picture], outcome: Outcome) -> list[Any]:
        """Return the pictures of one batch, made in one call, or in smaller ones where memory is short."""
        group, found = part[0].group, []
        rows = self._rows.get(group, self.job.max_rows)
        prompts, seeds = [one.prompt for one in part], [one.seed for one in part]
        step = lambda done, of: self.tell("step", done, of)  # noqa: E731
        for batch in batches(recipe, self._pipe, prompts, seeds, max_rows=rows, on_step=step):
            if batch.prompts < len(part) - batch.first and batch.prompts * recipe.copies < rows:
                self._rows[group] = rows = batch.prompts * recipe.copies
            outcome.calls[batch.prompts] = outcome.calls.get(batch.prompts, 0) + 1
            outcome.evaluations += batch.evaluations * batch.prompts
            found += [_Made(part[batch.first + i], batch, i) for i in range(batch.prompts)]
        return found

    def _failed(self, picture: Picture, kind: str, message: str) -> _Failed:
        return _Failed(self.failures.add(picture, kind, message))

    def _write(self, work: Work, first: int, recipe: Recipe, made: Sequence[Any]) -> None:
        pictures: dict[str, bytes] = {}
        records: list[dict[str, Any]] = []
        for one in made:
            for name, data, record in one.files(recipe, self.setup, self.job.metadata) if one else ():
                pictures[name] = data
                records.append(record)
        failures = [one.record for one in made if isinstance(one, _Failed)]
        work.save(first, self.job.run, pictures, records, failures)


@dataclass(frozen=True)
class _Failed:
    """A picture that could not be made."""

    record: Mapping[str, Any]

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class _Made:
    """A picture of a batch, or all particles of one."""

    picture: Picture
    batch: Batch
    index: int

    def files(
        self, recipe: Recipe, setup: Mapping[str, Any], metadata: bool
    ) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """Yield name, PNG file and record of every picture."""
        row = Row(recipe, self.picture.prompt, self.picture.seed, setup)
        for number, piece in enumerate(row.pieces):
            place = self.index * self.batch.each + number
            image, reward = self.batch.images[place], self.batch.rewards[place]
            name = self.picture.id + ("" if piece is None else f"-particle-{piece:02d}") + ".png"
            reached = {} if reward is None else {"rewards": {recipe.reward: reward}}
            settings = {**row.settings(piece), "used": {**self.batch.used, "versions": versions()}, **reached}
            record = {
                "id": self.picture.id,
                "file": name,
                **row.settings(piece),
                "width": image.width,
                "height": image.height,
                "evaluations": self.batch.evaluations,
                "batch": self.batch.prompts,
                **reached,
                **({"meta": dict(self.picture.meta)} if self.picture.meta else {}),
            }
            yield name, png_bytes(image, settings if metadata else None), record


class _Saver:
    """Encodes and writes beside the network, on two threads, with a bounded number of batches waiting."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="saver")
        self._room = BoundedSemaphore(_WAITING)
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> _Saver:
        return self

    def put(self, write: Callable[..., None], *args: Any) -> None:
        """Have a batch written; an error of an earlier one is raised here."""
        self._room.acquire()
        self._raise(done=True)
        job = self._pool.submit(write, *args)
        job.add_done_callback(lambda _: self._room.release())
        self._jobs.append(job)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise(done=False)

    def _raise(self, *, done: bool) -> None:
        ready = [job for job in self._jobs if job.done() or not done]
        self._jobs = [job for job in self._jobs if job not in ready]
        for job in ready:
            job.result()
