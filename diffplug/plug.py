"""Attaching plugs to a pipeline, and taking them off so that the pipeline is what it was before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from diffplug.intercept import PipelineCall, Undo, current_scheduler, intercept_call
from diffplug.scheduler.plug import SchedulerPlug, is_scheduler, refuse_watched

_KEY = "_diffplug_plugged"
_ATTACHING = threading.RLock()


@runtime_checkable
class Plug(Protocol):
    """Anything that can be attached to a pipeline; its attribute `slot`, if any, names the part it claims."""

    def attach(self, pipe: Any) -> Undo:
        """Changes the pipeline, and returns a function that takes exactly this change back."""
        ...


def plug(pipe: Any, *plugs: Any) -> Attachment:
    """The attachment of `plugs` to a pipeline: `with plug(pipe, ...) as pipe:` or `undo = plug(pipe, ...)`.

    A plug is a Diffusers scheduler (class or object), or any object with `attach(pipe) -> undo`. Schedulers
    are attached first, the others in the order given; they are taken off in reverse, also after an exception,
    and also when a later plug cannot be attached. Attachments nest.

    A pipeline serves one call at a time: a server takes a sibling for each request, which shares the weights,
    and plugs into that. Inside a `with` block calls from other threads are refused.

        def answer(prompt):
            mine = diffplug.sibling(pipe)
            with plug(mine, Solver("six.json")):
                return mine(prompt, num_inference_steps=6).images[0]

    Copies of a plugged pipeline (`copy`, `deepcopy`) keep its sampler for good, with the choices that it
    makes at every call; what stands at its steps, as steering does, stays with the pipeline itself. A
    pipeline made by `from_pipe`, or saved and loaded, has the scheduler alone: it chooses by the number of
    steps, and warns where guidance would matter. Skip coefficients of schedules act on the network, which
    copies share.

    ValueError: something is no plug; two plugs claim the same slot; a scheduler comes after what stands at
    the old one's step; another thread holds the pipeline in a `with` block.
    """
    wanted = sorted((_as_plug(one) for one in plugs), key=lambda one: _slot(one) != "scheduler")
    attachment = Attachment(pipe)
    with _ATTACHING:
        _check_thread(pipe)
        try:
            for one in wanted:
                attachment.add(one)
        except BaseException:
            attachment()
            raise
    return attachment


class Attachment:
    """Plugs on a pipeline; call it, or leave its `with` block, to take them off. Twice is harmless."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.thread: threading.Thread | None = None
        self._records: list[_Record] = []
        self._over = False
        self._unguard: Undo | None = None

    def add(self, one: Any) -> None:
        """Attaches one more plug."""
        _check_slot(self.pipe, one)
        undo = one.attach(self.pipe)
        if not callable(undo):
            raise ValueError(
                f"{_name(one)}.attach() gave {undo!r}: it must return a function that undoes it."
            )
        record = _Record(one, undo, self)
        self._records.append(record)
        if not _records(self.pipe):
            vars(self.pipe)[_KEY] = _Plugged(id(self.pipe))
        vars(self.pipe)[_KEY].records.append(record)

    def __call__(self) -> None:
        """Takes the plugs off, the last one first; the first error is raised after all had their turn."""
        first: Exception | None = None
        with _ATTACHING:
            self._over, self.thread = True, None
            if self._unguard is not None:
                self._unguard()
                self._unguard = None
            while self._records:
                record = self._records.pop()
                _forget(self.pipe, record)
                try:
                    record.undo()
                except Exception as error:
                    first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> Any:
        if self._over:
            raise ValueError("These plugs were taken off already: call plug() again.")
        self.thread = threading.current_thread()
        if self._records and callable(self.pipe):
            self._unguard = intercept_call(self.pipe, self._same_thread)
        return self.pipe

    def _same_thread(self, call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        """The pipeline's output; ValueError where another thread calls it inside this one's block."""
        _check_thread(self.pipe)
        return call(**kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


@dataclass(frozen=True, eq=False)
class _Record:
    """One plug on a pipeline."""

    plug: Any
    undo: Undo
    attachment: Attachment


@dataclass
class _Plugged:
    """What a pipeline remembers while something is plugged in; copies of the pipeline start without.

    owner: id of the pipeline; a shallow copy shares this object, which says nothing about it.
    """

    owner: int = 0
    records: list[_Record] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plugged:
        return _Plugged()

    def __reduce__(self) -> tuple[type[_Plugged], tuple[()]]:
        return _Plugged, ()


def _records(pipe: Any) -> Sequence[_Record]:
    plugged = vars(pipe).get(_KEY)
    return plugged.records if plugged is not None and plugged.owner == id(pipe) else ()


def plugs_on(pipe: Any) -> list[Any]:
    """Return what is plugged into a pipeline at present, in the order of attaching."""
    return [record.plug for record in _records(pipe)]


def plugged_names(pipe: Any) -> list[str]:
    """Return the names of what is plugged into a pipeline at present."""
    return [_name(record.plug) for record in _records(pipe)]


def _forget(pipe: Any, record: _Record) -> None:
    plugged = vars(pipe)[_KEY]
    plugged.records.remove(record)
    if not plugged.records:
        del vars(pipe)[_KEY]


def _check_slot(pipe: Any, one: Any) -> None:
    """ValueError when what a plug claims is taken."""
    slot = _slot(one)
    for record in _records(pipe):
        if slot is not None and slot == _slot(record.plug):
            raise ValueError(
                f"{_name(one)} and {_name(record.plug)} both claim the pipeline's {slot}: "
                "plug only one of them, or undo the other first."
            )
    if slot == "scheduler":
        refuse_watched(current_scheduler(pipe), _name(one))


def _check_thread(pipe: Any) -> None:
    """ValueError when another thread is inside a `with plug(pipe, ...)` block."""
    here = threading.current_thread()
    for record in _records(pipe):
        owner = record.attachment.thread
        if owner is not None and owner is not here:
            raise ValueError(
                f"{_name(record.plug)} sits on this {type(pipe).__name__} in a with block of thread "
                f"{owner.name!r}: give every thread its own pipeline (they may share the weights)."
            )


def _as_plug(one: Any) -> Any:
    if is_scheduler(one):
        return SchedulerPlug(one)
    if isinstance(one, type):
        raise ValueError(
            f"{one.__name__} is a class: plug an object of it, {one.__name__}(...), or a Diffusers scheduler."
        )
    if not isinstance(one, Plug):
        raise ValueError(
            f"{one!r} cannot be plugged: give a Diffusers scheduler, or an object with attach(pipe) -> undo."
        )
    return one


def _slot(one: Any) -> str | None:
    return getattr(one, "slot", None)


def _name(one: Any) -> str:
    return str(one) if isinstance(one, SchedulerPlug) else type(one).__name__
