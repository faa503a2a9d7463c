"""Options that another option decides: given together, one of the two would silently do nothing.

A table as data, read by `idle`: what a person gives in vain is refused by name; what only comes along in the
configuration of a replaced scheduler is left out of account.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffplug.messages import shown
from diffplug.scheduler.options import FLOW_GRIDS

__all__ = ["idle", "idle_names", "refuse_idle", "same_method"]

Options = Mapping[str, Any]
UNIPC = ("solver_order", "solver_type", "predict_x0", "lower_order_final", "disable_corrector")
SPACING = ("timestep_spacing", "steps_offset")
RANGE = ("sigma_min", "sigma_max")


@dataclass(frozen=True)
class Rule:
    """While `holds`, `decider` decides what these options are about; instead: what to do."""

    decider: str
    options: tuple[str, ...]
    holds: Callable[[Options], bool]
    instead: str


def _on(*names: str) -> Callable[[Options], bool]:
    return lambda options: any(options.get(name) for name in names)


def _off(*names: str) -> Callable[[Options], bool]:
    return lambda options: not any(options.get(name) for name in names)


def _schedules_alone(options: Options) -> bool:
    return bool(options.get("schedules")) and not options.get("solver")


def _another_solver(options: Options) -> bool:
    return options.get("solver") not in (None, "unipc")


RULES: tuple[Rule, ...] = (
    Rule(
        "the schedules decide everything",
        ("grid", "final_sigmas_type", "solver_options", *UNIPC, *SPACING, *FLOW_GRIDS, *RANGE),
        _schedules_alone,
        "leave it out, or name a solver= for the runs that no schedule is for",
    ),
    Rule(
        "solver= decides for itself", UNIPC, _another_solver, "use solver_options={...}, as in {'order': 3}"
    ),
    Rule("grid= decides where steps lie", (*SPACING, *FLOW_GRIDS, *RANGE), _on("grid"), "give one of them"),
    Rule(
        "use_karras_sigmas and the like decide where steps lie", SPACING, _on(*FLOW_GRIDS), "give one of them"
    ),
    Rule(
        "it is the range of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas",
        RANGE,
        _off(*FLOW_GRIDS),
        "give one of those too, or leave it out",
    ),
    Rule(
        "the model is for flow matching (use_flow_sigmas)",
        (*SPACING, *RANGE),
        _on("use_flow_sigmas"),
        "name a grid= instead, or leave it out",
    ),
    Rule("it is for flow models (use_flow_sigmas)", ("flow_shift",), _off("use_flow_sigmas"), "leave it out"),
    Rule(
        "it is for use_dynamic_shifting", ("time_shift_type",), _off("use_dynamic_shifting"), "leave it out"
    ),
    Rule(
        "it is for timestep_spacing='leading'",
        ("steps_offset",),
        lambda options: options.get("timestep_spacing") != "leading",
        "leave it out",
    ),
    Rule(
        "it is for thresholding=True",
        ("dynamic_thresholding_ratio", "sample_max_value"),
        _off("thresholding"),
        "leave it out",
    ),
    Rule("it is for clip_sample=True", ("clip_sample_range",), _off("clip_sample"), "leave it out"),
)


def idle(options: Options, names: Collection[str]) -> dict[str, Rule]:
    """Return those of the named options that do nothing beside the others, each with its rule.

    options: all of them, by name, with their defaults.
    """
    return {name: rule for rule in RULES if rule.holds(options) for name in rule.options if name in names}


def idle_names(given: Options, defaults: Options) -> set[str]:
    """Return what does nothing beside the given options, of whatever comes along with them.

    Includes two options of other schedulers that say where steps lie.
    """
    options = {**defaults, **given}
    rules = [rule for rule in RULES if rule.holds(options) and not rule.holds(defaults)]
    names = {name for rule in rules for name in rule.options} - given.keys()
    decided = "timestep_spacing" in names or "timestep_spacing" in given
    return names | ({"use_lu_lambdas", "interpolation_type"} if decided else set())


def refuse_idle(options: Options, given: Collection[str], defaults: Options) -> None:
    """Raise ValueError for an option that was given, is not at its default, and does nothing."""
    for name, rule in idle(options, given).items():
        if not _same(options[name], defaults.get(name)):
            given_value = f"{name}={shown(options[name])}"
            raise ValueError(f"{given_value} does nothing here: {rule.decider}; {rule.instead}")


SAME: Mapping[str, tuple[str, str]] = {
    "dpm++": ("DPMSolverMultistepScheduler", "dpmpp"),
    "deis": ("DEISMultistepScheduler", "deis"),
    "singlestep": ("DPMSolverSinglestepScheduler", "singlestep"),
}
"""Solvers that Diffusers has too: their options are taken over from a pipeline's own scheduler."""


def same_method(config: Options, options: Options) -> dict[str, Any]:
    """Return solver_options for a named solver that the configuration is of too, where none are given."""
    class_name, preset = SAME.get(options.get("solver") or "", ("", ""))
    if not class_name or config.get("_class_name") != class_name or options.get("solver_options"):
        return {}
    found: dict[str, Any] = {"order": config["solver_order"]}
    if preset != "singlestep":
        found["lower_order_final"] = config["lower_order_final"]
    if preset != "deis":
        found["kind"] = config["solver_type"]
        found["param"] = "data" if config["algorithm_type"].endswith("++") else "noise"
    return {"solver_options": found}


def _same(value: Any, default: Any) -> bool:
    """Whether a value is the default, where lists are compared as tuples and arrays are never one."""
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return value is default or (isinstance(value, (str, bool, int, float)) and value == default)
