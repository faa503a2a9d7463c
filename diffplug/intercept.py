"""The one way to stand between a pipeline and its parts.

An object is intercepted by giving it a generated subclass of its own class, with the same name: `isinstance`,
`inspect.signature`, saving, pickling and copying see what they saw before, and nothing is written into the
object. Every layer is kept on that subclass; the last one to be undone gives the object its own class back.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

Undo = Callable[[], None]
Around = Callable[["PipelineCall", "dict[str, Any]"], Any]
T = TypeVar("T")

_ORIGINAL = "_diffplug_original"
_LAYERS = "_diffplug_layers"
_STEP_FIELDS = ("model_output", "timestep", "sample")


@dataclass(frozen=True, eq=False)
class _Layer:
    """One interception: what to call, and the builder of the subclass that calls it."""

    target: Any
    build: Callable[[type, tuple[_Layer, ...]], type]
    takes: tuple[str, ...] = ()


@dataclass
class StepCall:
    """One call of `scheduler.step`, with its arguments by name; change the fields, then `run()`.

    `kwargs` holds every argument beside the three named ones that the pipeline gave (`generator`, `eta`,
    `return_dict`, CogVideoX's `timestep_back`, ...); defaults are not filled in.
    """

    scheduler: Any
    model_output: Any
    timestep: Any
    sample: Any
    kwargs: dict[str, Any]
    _inner: tuple[_Layer, ...] = field(default=(), repr=False)

    def run(self) -> Any:
        """What the scheduler's own step returns for the fields as they are; may be called more than once."""
        if self._inner:
            inner = replace(self, kwargs=dict(self.kwargs), _inner=self._inner[:-1])
            return self._inner[-1].target.on_step(inner)
        own = original_class(self.scheduler).step
        named = {name: getattr(self, name) for name in _STEP_FIELDS}
        return own(self.scheduler, **named, **self.kwargs)


class StepInterceptor:
    """Does nothing; a base class for what stands between a pipeline and its scheduler.

    `first = True` puts an interceptor outside all others that do not ask for it, whenever they are attached.
    """

    first: bool = False

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Called after every `scheduler.set_timesteps`: a new run begins, forget the last one."""

    def on_step(self, call: StepCall) -> Any:
        """What `scheduler.step` returns to the pipeline."""
        return call.run()

    def follower(self) -> StepInterceptor:
        """The interceptor of a copy of the scheduler, for pipelines that copy it for a second stream."""
        return StepInterceptor()


@dataclass(frozen=True, eq=False)
class PipelineCall:
    """The call of a pipeline, from one layer on inward.

    `asked` holds the arguments that the person gave, by name, whatever the layers outside made of them.
    """

    pipe: Any
    asked: Mapping[str, Any]
    _inner: tuple[_Layer, ...] = field(default=(), repr=False)

    def __call__(self, **kwargs: Any) -> Any:
        """What the pipeline returns for these arguments; may be called more than once."""
        if self._inner:
            return self._inner[-1].target(PipelineCall(self.pipe, self.asked, self._inner[:-1]), kwargs)
        return original_class(self.pipe).__call__(self.pipe, **kwargs)


def undo_all(undos: list[Undo]) -> Undo:
    """Return what runs these backwards, each once, however often it is called; the list is emptied."""

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def intercept_step(scheduler: Any, interceptor: StepInterceptor) -> Undo:
    """A function that takes `interceptor` away again; until then it stands at `scheduler.step`.

    Interceptors stack: the last attached is the outermost and sees the pipeline's arguments first (see
    `StepInterceptor.first`). They can be undone in any order, and twice.
    ValueError: `scheduler` has no step with the usual arguments, or one replaced on the object itself.
    """
    _check_step(scheduler)
    layer = _Layer(interceptor, _step_class)
    layers = _layers(scheduler)
    # `first` layers stay on the outside, that is at the end
    place = len(layers) if interceptor.first else sum(not entry.target.first for entry in layers)
    return _insert(scheduler, layer, place)


def intercept_call(
    pipe: Any, around: Around, *, innermost: bool = False, takes: tuple[str, ...] = ()
) -> Undo:
    """A function that takes `around` away again; until then it stands around `pipe(...)`.

    `around(call, kwargs)` returns the pipeline's output; kwargs are the arguments of this call by name,
    without defaults, and `call(**kwargs)` runs what lies further in. The last attached is the outermost,
    unless `innermost` puts it next to the pipeline. Interceptors can be undone in any order, and twice. One
    with an attribute `follows_copies` that is true stands around copies of the pipeline as well, for good.
    takes: arguments that a call may have although the pipeline has not; `around` has to take them out.
    """
    if not callable(pipe):
        raise ValueError(f"{type(pipe).__name__} cannot be called: give a pipeline.")
    return _insert(pipe, _Layer(around, _call_class, takes), 0 if innermost else len(_layers(pipe)))


def original_class(obj: Any) -> type[Any]:
    """The class that an object had before it was intercepted (its class, when it is not)."""
    cls = type(obj)
    return vars(cls).get(_ORIGINAL, cls)


def interceptors(obj: Any) -> list[Any]:
    """What stands around an object at present, innermost first."""
    return [layer.target for layer in _layers(obj)]


def taken_arguments(pipe: Any) -> set[str]:
    """Return the arguments that the layers around a pipeline's call take for themselves, whoever else knows
    them.
    """
    return {name for layer in _layers(pipe) for name in layer.takes}


def bare_copy(obj: T, *, deep: bool = True) -> T:
    """A copy of an object without any interceptor, for trying a step that nobody should see."""
    return _copy_as_original(obj, {} if deep else None)


def _layers(obj: Any) -> tuple[_Layer, ...]:
    """The layers on an object, innermost first."""
    return vars(type(obj)).get(_LAYERS, ())


def _insert(obj: Any, layer: _Layer, place: int) -> Undo:
    layers = _layers(obj)
    _set_layers(obj, (*layers[:place], layer, *layers[place:]))
    return functools.partial(_remove, obj, layer)


def _remove(obj: Any, layer: _Layer) -> None:
    layers = _layers(obj)
    if layer in layers:
        _set_layers(obj, tuple(entry for entry in layers if entry is not layer))
    elif any(layer in vars(cls).get(_LAYERS, ()) for cls in type(obj).__mro__):
        raise RuntimeError(
            f"The class of this {original_class(obj).__name__} was changed by something else after diffplug "
            "intercepted it: undo that first."
        )


def _set_layers(obj: Any, layers: tuple[_Layer, ...]) -> None:
    original = original_class(obj)
    obj.__class__ = layers[0].build(original, layers) if layers else original


def _check_step(scheduler: Any) -> None:
    name = type(scheduler).__name__
    step = getattr(type(scheduler), "step", None)
    if step is None or not set(_STEP_FIELDS) <= set(inspect.signature(step).parameters):
        raise ValueError(f"{name} has no step(model_output, timestep, sample): give a Diffusers scheduler.")
    for method in {"step", "set_timesteps"} & set(vars(scheduler)):
        raise ValueError(
            f"{name}.{method} was replaced on the object itself, which hides any interceptor: "
            f"delete that attribute (del scheduler.{method}) first."
        )


def _step_class(original: type[Any], layers: tuple[_Layer, ...]) -> type:
    """A subclass of a scheduler's class whose step and set_timesteps go through the layers."""
    signature = inspect.signature(original.step)

    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _by_name(signature, self, args, kwargs)
        output, timestep, sample = (given.pop(name) for name in _STEP_FIELDS)
        return StepCall(self, output, timestep, sample, given, layers).run()

    body: dict[str, Any] = {"step": step}
    if hasattr(original, "set_timesteps"):

        @functools.wraps(original.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original.set_timesteps(self, *args, **kwargs)
            for layer in layers:
                layer.target.on_set_timesteps(self)
            return result

        body["set_timesteps"] = set_timesteps
    return _subclass(original, layers, body)


def _call_class(original: type[Any], layers: tuple[_Layer, ...]) -> type:
    """A subclass of a pipeline's class whose call goes through the layers."""
    signature = inspect.signature(original.__call__)
    foreign = {name for layer in layers for name in layer.takes} - {*signature.parameters}

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = {name: kwargs.pop(name) for name in foreign & {*kwargs}}
        given = _by_name(signature, self, args, kwargs) | taken
        return PipelineCall(self, MappingProxyType(dict(given)), layers)(**given)

    return _subclass(original, layers, {"__call__": call})


def _by_name(
    signature: inspect.Signature, obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a method call by name, without the object; those of `**kwargs` lie among them."""
    given = dict(signature.bind(obj, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given


def _subclass(original: type, layers: tuple[_Layer, ...], body: dict[str, Any]) -> type:
    """A subclass that passes for its parent: same name, copies and pickles as the parent."""
    body |= {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__copy__": lambda self: _copy_with_followers(self, None),
        "__deepcopy__": _copy_with_followers,
        "__reduce_ex__": lambda self, protocol: (object.__new__, (original,), dict(vars(self))),
        _ORIGINAL: original,
        _LAYERS: layers,
    }
    return type(original)(original.__name__, (original,), body)


def _copy_with_followers(obj: Any, memo: dict[int, Any] | None) -> Any:
    """A copy (deep when there is a memo) of an intercepted object, with its interceptors' followers."""
    clone = _copy_as_original(obj, memo)
    for layer in _layers(obj):
        if isinstance(layer.target, StepInterceptor):
            follower = layer.target.follower()
            if type(follower) is not StepInterceptor:
                intercept_step(clone, follower)
        elif getattr(layer.target, "follows_copies", False):
            intercept_call(clone, layer.target)
    return clone


def _copy_as_original(obj: Any, memo: dict[int, Any] | None) -> Any:
    """A copy (deep when there is a memo) of an object, in its original class."""
    original = original_class(obj)
    own = getattr(original, "__copy__" if memo is None else "__deepcopy__", None)
    if own is not None:
        clone = own(obj) if memo is None else own(obj, memo)
        clone.__class__ = original
        return clone
    clone = object.__new__(original)
    if memo is None:
        vars(clone).update(vars(obj))
    else:
        memo[id(obj)] = clone
        vars(clone).update(copy.deepcopy(vars(obj), memo))
    return clone


def current_scheduler(pipe: Any) -> Any:
    """The scheduler of a pipeline; ValueError when it has none."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler: it takes no plug that works on one.")
    return scheduler
