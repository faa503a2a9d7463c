"""Schedulers that take every option of Diffusers' UniPC and some more: their constructor's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

from diffusers import UniPCMultistepScheduler


def constructor_signature(changed: Mapping[str, Any], own: Mapping[str, Any]) -> inspect.Signature:
    """UniPC's constructor with other defaults and more parameters; follows the installed Diffusers."""
    unipc = inspect.signature(UniPCMultistepScheduler.__init__).parameters.values()
    parameters = [p.replace(default=changed.get(p.name, p.default)) for p in unipc]
    more = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in own.items()]
    return inspect.Signature([*parameters, *more])


def defaults_of(signature: inspect.Signature) -> dict[str, Any]:
    """Every option of a constructor with its default."""
    return {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}


def with_signature(signature: inspect.Signature) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the constructor shows this signature, from which Diffusers makes the configuration."""

    def show(init: Callable[..., None]) -> Callable[..., None]:
        init.__signature__ = signature  # type: ignore[attr-defined]
        return init

    return show


def bound_options(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """All options by name, defaults filled in, and the names of those that were given."""
    given = signature.bind(None, *args, **kwargs)
    names = set(given.arguments)
    given.apply_defaults()
    options = {name: value for name, value in given.arguments.items() if name != "self"}
    options["disable_corrector"] = _steps_without_corrector(options["disable_corrector"])
    if options["use_flow_sigmas"] and "final_sigmas_type" not in names:
        options["final_sigmas_type"] = "zero"  # a flow has no smallest sigma: UniPC would repeat the last one
    return options, names


def _steps_without_corrector(steps: Any) -> list[int]:
    """The numbers of steps as a list of its own; ValueError for anything else."""
    given = () if steps is None else steps
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise ValueError(f"disable_corrector={steps!r}: give a list of the numbers of steps, the first is 0")
    for step in given:
        if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
            raise ValueError(f"disable_corrector holds {step!r}: give numbers of steps, the first is 0")
    return [int(step) for step in given]


ALLOWED: dict[str, tuple[Any, ...]] = {
    "solver_order": (1, 2, 3, 4, 5),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
}


def check_unipc(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of UniPC's that is unknown, or does not go with the rest."""
    for name, allowed in ALLOWED.items():
        if options[name] not in allowed:
            raise ValueError(f"{name}={options[name]!r}: allowed are {', '.join(map(str, allowed))}")
    if options["prediction_type"] != "flow_prediction":
        return
    if not options["use_flow_sigmas"]:
        raise ValueError("prediction_type='flow_prediction' needs use_flow_sigmas=True: set both, or neither")
    if not options["predict_x0"]:
        raise ValueError(
            "prediction_type='flow_prediction' works with predict_x0=True only: leave predict_x0 out"
        )
