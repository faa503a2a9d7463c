"""Schedulers as plugs: built from a pipeline's configuration, refused where they cannot work, put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import SchedulerMixin

from diffplug.intercept import Undo, original_class
from diffplug.noise import families as noise

_NOISE, _FLOW = "noise prediction", "flow matching"
_NOISE_FAMILIES = ("table", "solver", "ve")
_READ_BY_PIPELINES = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
_USUAL = {"self", "model_output", "timestep", "sample"}


@dataclass(frozen=True)
class SchedulerPlug:
    """Gives a pipeline another scheduler: a class (built from its configuration) or an object as it is."""

    scheduler: Any
    slot = "scheduler"

    def attach(self, pipe: Any) -> Undo:
        """A function that puts the pipeline's own scheduler object back.

        ValueError: there is no scheduler, something stands at its step, or the model cannot take this one.
        """
        current = current_scheduler(pipe)
        built = build(self.scheduler, pipe) if isinstance(self.scheduler, type) else self.scheduler
        check(built, current, pipe)
        return swap(pipe, built)

    def __str__(self) -> str:
        cls = self.scheduler if isinstance(self.scheduler, type) else original_class(self.scheduler)
        return cls.__name__


def is_scheduler(plug: Any) -> bool:
    """Whether a plug is a Diffusers scheduler, as a class or as an object."""
    return isinstance(plug, SchedulerMixin) or (isinstance(plug, type) and issubclass(plug, SchedulerMixin))


def current_scheduler(pipe: Any) -> Any:
    """The scheduler of a pipeline; ValueError when it has none."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler: it takes no plug that works on one.")
    return scheduler


def swap(pipe: Any, scheduler: Any) -> Undo:
    """A function that puts the old scheduler object back; until then `pipe.scheduler` is the new one.

    ValueError: something stands at the old scheduler's step and would be left behind.
    """
    old = current_scheduler(pipe)
    refuse_watched(old, original_class(scheduler).__name__)
    pipe.scheduler = scheduler

    def undo() -> None:
        pipe.scheduler = old

    return undo


def refuse_watched(scheduler: Any, name: str) -> None:
    """ValueError when something stands at a scheduler's step, which `name` would leave behind."""
    if original_class(scheduler) is not type(scheduler):
        raise ValueError(
            f"{name} would replace a {type(scheduler).__name__} that is steered or seeded already: "
            "plug the scheduler first, or everything in one plug() call."
        )


def build(cls: Any, pipe: Any, **config: Any) -> Any:
    """A scheduler of class `cls` for a pipeline: its scheduler's configuration, then `config` on top.

    For flow-matching models the names are translated: `use_flow_sigmas`, `prediction_type`, and the shift.
    ValueError: the pipeline has no scheduler, or the class needs what its configuration does not have.
    """
    current = current_scheduler(pipe)
    try:
        built = cls.from_config(_known(cls, current.config), **{**_flow_settings(cls, current), **config})
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from the configuration of {type(current).__name__} ({error}): "
            "build it yourself and plug the object."
        ) from error
    # pipelines read these from the configuration of whatever scheduler they have
    read = {name: current.config[name] for name in _READ_BY_PIPELINES if name in current.config}
    built.register_to_config(**{name: value for name, value in read.items() if name not in built.config})
    return built


def _known(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a class takes of another's configuration: Diffusers warns of all else, which nobody can help."""
    takes = _parameters(cls)
    return {name: value for name, value in config.items() if name in takes or name.startswith("_")}


def check(scheduler: Any, current: Any, pipe: Any) -> None:
    """ValueError, in one sentence, when the model of a pipeline cannot work with a scheduler."""
    name, family = original_class(scheduler).__name__, type(pipe).__name__
    new, old = world(scheduler), world(current)
    if new != old:
        raise ValueError(f"{name} is for {new}, but the model of {family} is for {old}: {_advice(old)}")
    trouble = _unfit_step(scheduler, current) or _unfit_grid(scheduler, current, pipe)
    if trouble:
        raise ValueError(
            f"{name} does not fit {family}: {trouble}; try a relative of {type(current).__name__}."
        )


def world(scheduler: Any) -> str:
    """What kind of model a scheduler is for, in words; those of one world can replace each other."""
    try:
        kind = noise.family(scheduler).name
    except ValueError:
        return f"{_ancestor(type(scheduler)).__name__} only"
    if kind == "flow" or (kind == "solver" and scheduler.config.get("use_flow_sigmas")):
        return _FLOW
    return _NOISE if kind in _NOISE_FAMILIES else f"{kind} models"


def _ancestor(cls: type) -> type:
    """The nearest class of Diffusers that a scheduler class derives from, or itself."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("diffusers.")), cls)


def _advice(old: str) -> str:
    """What to do instead, for a pipeline whose model is for `old`."""
    if old == _FLOW:
        return (
            "use one with flow sigmas (use_flow_sigmas=True, prediction_type='flow_prediction'), such as "
            "UniPCMultistepScheduler, or FlowMatchEulerDiscreteScheduler."
        )
    if old == _NOISE:
        return "use a scheduler of that kind, such as DDIMScheduler or UniPCMultistepScheduler."
    return "keep the pipeline's own scheduler."


def _flow_settings(cls: type, current: Any) -> dict[str, Any]:
    """What to tell a class beside the configuration of a flow scheduler, which has other names for it."""
    if world(current) != _FLOW:
        return {}
    takes = _parameters(cls)
    name = "shift" if "shift" in _parameters(original_class(current)) else "flow_shift"
    shift = current.config.get(name, 1.0)
    if "use_flow_sigmas" in takes:
        told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    else:
        told = {"shift": shift}
    return {name: value for name, value in told.items() if name in takes}


def _unfit_step(scheduler: Any, current: Any) -> str:
    """What `step` needs that the pipeline will not give, in words; empty when nothing."""
    needed = {
        name
        for name, parameter in _parameters(type(scheduler).step).items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    missing = needed - _USUAL - set(_parameters(type(current).step))
    return f"its step needs {', '.join(sorted(missing))}" if missing else ""


def _unfit_grid(scheduler: Any, current: Any, pipe: Any) -> str:
    """What the pipeline will give that `set_timesteps` does not take, in words; empty when nothing."""
    if current.config.get("invert_sigmas") and not scheduler.config.get("invert_sigmas"):
        return "it runs from noise to picture, this model the other way (invert_sigmas)"
    takes = _parameters(type(scheduler).set_timesteps)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return ""
    given = {"original_inference_steps"} & set(_parameters(type(pipe).__call__))
    if current.config.get("use_dynamic_shifting"):
        given |= {"mu"}
    missing = given - set(takes)
    return f"its set_timesteps does not take {', '.join(sorted(missing))}" if missing else ""


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
