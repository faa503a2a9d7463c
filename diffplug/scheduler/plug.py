"""Schedulers as plugs: built from a pipeline's configuration, refused where they cannot work, put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffplug.intercept import (
    Around,
    PipelineCall,
    Undo,
    bare_copy,
    current_scheduler,
    intercept_call,
    original_class,
)
from diffplug.noise.prediction import is_continuous
from diffplug.scheduler.calls import SchedulerCalls, scheduler_calls
from diffplug.scheduler.options import ALONE, OPTIONS, ancestor, handed_on
from diffplug.scheduler.pipeline_quirks import lost_arguments

_NOISE, _FLOW = "noise prediction", "flow matching"
_CONTINUOUS = "continuous noise levels (timestep_type='continuous')"
_NOISE_FAMILIES = ("table", "solver", "ve")
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
        if built is not self.scheduler:
            check_noise(built, current)
        return plugged_in(pipe, built, around_call(built, pipe))

    def __str__(self) -> str:
        cls = self.scheduler if isinstance(self.scheduler, type) else original_class(self.scheduler)
        return cls.__name__


def is_scheduler(plug: Any) -> bool:
    """Whether a plug is a Diffusers scheduler, as a class or as an object."""
    from diffusers import SchedulerMixin  # not above: half a second, and a third of the memory of torch

    return isinstance(plug, SchedulerMixin) or (isinstance(plug, type) and issubclass(plug, SchedulerMixin))


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


def plugged_in(pipe: Any, scheduler: Any, around: Around | None) -> Undo:
    """A function that puts the pipeline's own scheduler back; until then `scheduler` is in its place.

    around: what stands around every call of the pipeline meanwhile (see `intercept_call`), if anything.
    """
    undo_swap = swap(pipe, scheduler)
    if around is None:
        return undo_swap
    try:
        undo_call = intercept_call(pipe, around)
    except BaseException:
        undo_swap()
        raise

    def undo() -> None:
        try:
            undo_call()
        finally:
            undo_swap()

    return undo


def around_call(scheduler: Any, pipe: Any) -> Around | None:
    """What a scheduler wants around the calls of its pipeline, or what refuses a grid that would be lost."""
    if hasattr(scheduler, "around_call"):
        wanted: Around = scheduler.around_call()
        return wanted
    grids = {"sigmas", "timesteps"}
    lost = {name: why for name, why in lost_arguments(pipe, scheduler).items() if name in grids}
    return RefuseLost(original_class(scheduler).__name__, tuple(lost.items())) if lost else None


@dataclass(frozen=True)
class RefuseLost:
    """Stands around the calls of a pipeline: a ValueError for a grid that would not reach its scheduler."""

    scheduler: str
    lost: tuple[tuple[str, str], ...]
    follows_copies: ClassVar[bool] = True

    def __call__(self, call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        for name, why in self.lost:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}= would do nothing: with {self.scheduler} it {why}; plug "
                    "diffplug.samplers.Solver(...), which hands it on, or leave it out"
                )
        return call(**kwargs)


def refuse_watched(scheduler: Any, name: str) -> None:
    """ValueError when something stands at a scheduler's step, which `name` would leave behind."""
    if original_class(scheduler) is not type(scheduler):
        raise ValueError(
            f"{name} would replace a {type(scheduler).__name__} that is steered or seeded already: "
            "plug the scheduler first, or everything in one plug() call."
        )


def build(cls: Any, pipe: Any, **config: Any) -> Any:
    """A scheduler of class `cls` for a pipeline: its scheduler's configuration, then `config` on top.

    What becomes of every option says `diffplug.scheduler.options`; for flow-matching models names are
    translated (`use_flow_sigmas`, `prediction_type`, the shift), and noise levels that a class makes by a
    formula of its own are given as `trained_betas`. ValueError: the pipeline has no scheduler, the class
    needs what its configuration does not have, or cannot do what an option of it says.
    """
    current = current_scheduler(pipe)
    source = ancestor(original_class(current))  # type: ignore[arg-type]
    if source.__name__ in ALONE and not issubclass(cls, source):
        raise ValueError(
            f"{cls.__name__} cannot take the place of {source.__name__}: no other scheduler runs the model "
            f"of {type(pipe).__name__}; keep the pipeline's own."
        )
    idle = cls.idle_options(config) if hasattr(cls, "idle_options") else ()
    options = handed_on(cls, current.config, original_class(current), {*config, *idle})
    if hasattr(cls, "idle_options"):
        options["_replaced"] = {"_class_name": type(current).__name__, **current.config}
    told = {**_flow_settings(cls, current), **config}
    built = _built(cls, options, told, current)
    if "trained_betas" not in config and _told_wrong_noise(built, current):
        built = _built(cls, options, {**told, "trained_betas": _betas(current)}, current)
    # pipelines read these from the configuration of whatever scheduler they have
    read = {name: value for name, value in current.config.items() if OPTIONS.get(name) == "pipeline"}
    read |= {"variance_type": None} if "variance_type" in read else {}  # who replaces it predicts means alone
    built.register_to_config(**{name: value for name, value in read.items() if name not in built.config})
    return built


def _built(cls: Any, options: Mapping[str, Any], told: Mapping[str, Any], current: Any) -> Any:
    try:
        return cls.from_config(dict(options), **told)
    except NotImplementedError as error:  # a way to make betas that the class does not know
        if "trained_betas" in told or not hasattr(current, "betas"):
            raise ValueError(f"{cls.__name__} cannot take over: {error}") from error
        return _built(cls, options, {**told, "trained_betas": current.betas.tolist()}, current)
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from the configuration of {type(current).__name__} ({error}): "
            "build it yourself and plug the object."
        ) from error


def _told_wrong_noise(built: Any, current: Any) -> bool:
    """Whether a class took other noise levels from the options than the ones they stand for."""
    return (
        "trained_betas" in _parameters(type(built))
        and noise_differs(built, current)
        and not noise_differs(original_class(current).from_config(current.config), current)
    )


def _betas(current: Any) -> list[float]:
    """The betas whose products are a scheduler's noise levels."""
    cumprod = current.alphas_cumprod.cpu().double()
    betas: list[float] = (1 - cumprod / torch.cat([cumprod.new_ones(1), cumprod[:-1]])).tolist()
    return betas


def noise_differs(scheduler: Any, current: Any) -> bool:
    """Whether two schedulers of noise-predicting models have tables of noise levels, and different ones."""
    if world(scheduler) != _NOISE or world(current) != _NOISE:
        return False
    tables: list[Any] = [getattr(one, "alphas_cumprod", None) for one in (scheduler, current)]
    if tables[0] is None or tables[1] is None:
        return False
    ours, theirs = (table.cpu().double() for table in tables)
    return ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def check(scheduler: Any, current: Any, pipe: Any) -> None:
    """ValueError, in one sentence, when the model of a pipeline cannot work with a scheduler."""
    name, family = original_class(scheduler).__name__, type(pipe).__name__
    new, old = world(scheduler), world(current)
    if new != old:
        raise ValueError(f"{name} is for {new}, but the model of {family} is for {old}: {_advice(old)}")
    trouble = (
        _unfit_step(scheduler, current, pipe)
        or _unfit_grid(scheduler, current, pipe)
        or (_unfit_flow(scheduler, pipe) if new == _FLOW else "")
    )
    if trouble:
        raise ValueError(
            f"{name} does not fit {family}: {trouble}; try a relative of {type(current).__name__}."
        )


def world(scheduler: Any) -> str:
    """What kind of model a scheduler is for, in words; those of one world can replace each other."""
    from diffplug.noise.families import family  # here alone; what stands on plugs stays low

    try:
        kind = family(scheduler).name
    except ValueError:
        return f"{ancestor(original_class(scheduler)).__name__} only"  # type: ignore[arg-type]
    if is_continuous(scheduler.config):
        return _CONTINUOUS
    if kind == "flow" or (kind == "solver" and scheduler.config.get("use_flow_sigmas")):
        return _FLOW
    return _NOISE if kind in _NOISE_FAMILIES else f"{kind} models"


def check_noise(scheduler: Any, current: Any) -> None:
    """ValueError unless the new scheduler has the noise levels that the model was trained with."""
    if noise_differs(scheduler, current):
        raise ValueError(
            f"{type(current).__name__} has noise levels that its configuration does not tell: "
            "pass trained_betas= with the betas of the model"
        )


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
    shift = current.config.get(name, 1.0) if name != "shift" else getattr(current, "shift", 1.0)
    if "use_flow_sigmas" in takes:
        told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        if current.config.get("use_dynamic_shifting"):  # by the size of the picture: no shift of its own
            del told["flow_shift"]
    else:
        told = {"shift": shift}
    return {name: value for name, value in told.items() if name in takes}


def _unfit_step(scheduler: Any, current: Any, pipe: Any) -> str:
    """What `step` needs that the pipeline will not give, or the other way round; empty when nothing."""
    takes = _parameters(original_class(scheduler).step)
    needed = {
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    usual = set(_parameters(original_class(current).step))
    missing = needed - _USUAL - usual
    if missing:
        return f"its step needs {', '.join(sorted(missing))}"
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return ""
    asks = _asks(pipe)
    unknown = asks.step & usual - set(takes)  # what its own scheduler does not take stands behind a branch
    if unknown:
        return f"the pipeline gives its step {', '.join(sorted(unknown))}"
    missed = {name for name in asks.methods if hasattr(current, name) and not hasattr(scheduler, name)}
    return f"the pipeline calls its {', '.join(sorted(missed))}" if missed else ""


def _asks(pipe: Any) -> SchedulerCalls:
    return scheduler_calls(original_class(pipe))  # type: ignore[arg-type]


def _unfit_flow(scheduler: Any, pipe: Any) -> str:
    """What is wrong with the grid that a scheduler makes for a flow model, whose sigmas end at 1."""
    if getattr(scheduler, "has_flow_grids", False):  # ours say so themselves
        return ""
    trial, takes = bare_copy(scheduler), _parameters(original_class(scheduler).set_timesteps)
    shifted = "mu" in _asks(pipe).timesteps
    gives_mu = "mu" in takes and (shifted or scheduler.config.get("use_dynamic_shifting"))
    try:
        trial.set_timesteps(4, **({"mu": 0.5} if gives_mu else {}))
    except AssertionError:
        return "the pipeline shifts by mu, which it takes with use_dynamic_shifting alone"
    except Exception:  # a schedule for another number of steps: the run itself will say so
        return ""
    highest = float(trial.sigmas.max())
    if highest <= 1 + 1e-6:
        return ""
    return f"its sigmas go up to {highest:g}, those of flow models to 1 (use_karras_sigmas and the like)"


def _unfit_grid(scheduler: Any, current: Any, pipe: Any) -> str:
    """What the pipeline will give that `set_timesteps` does not take, in words; empty when nothing."""
    if current.config.get("invert_sigmas") and not scheduler.config.get("invert_sigmas"):
        return "it runs from noise to picture, this model the other way (invert_sigmas)"
    takes = _parameters(original_class(scheduler).set_timesteps)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return ""
    given = {"original_inference_steps"} & set(_parameters(type(pipe).__call__))
    given |= _asks(pipe).timesteps & set(_parameters(original_class(current).set_timesteps))
    if current.config.get("use_dynamic_shifting"):
        given |= {"mu"}
    missing = given - set(takes)
    return f"its set_timesteps does not take {', '.join(sorted(missing))}" if missing else ""


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
