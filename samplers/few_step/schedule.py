"""The scheduler of a row for a pipeline's model, built from its configuration and checked against it."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch

from diffplug.intercept import current_scheduler, original_class
from diffplug.samplers.few_step.catalogue import Row
from diffplug.scheduler.plug import build, check

_OURS = {
    "ListedDDIMScheduler": "diffplug.samplers.few_step.listed_ddim",
    "FlowMatchTCDScheduler": "diffplug.samplers.few_step.flow_tcd",
}
_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def scheduler_class(name: str) -> Any:
    """Return a scheduler class of this package or of Diffusers; ValueError when there is none."""
    found = getattr(import_module(_OURS.get(name, "diffusers")), name, None)
    if found is None:
        raise ValueError(f"there is no scheduler {name!r} in this version of Diffusers")
    return found


def scheduler_for(row: Row, pipe: Any, eta: float | None = None) -> Any:
    """Return a new scheduler for the row on the pipeline's model; None where it keeps its own as it is.

    Raises ValueError where the model's noise levels are not those that the scheduler would have, unless the
    row says others: AnimateDiff's motion modules are trained on those of a linear beta schedule.
    """
    current = current_scheduler(pipe)
    if not row.scheduler and not row.scheduler_options:
        return None
    cls = scheduler_class(row.scheduler) if row.scheduler else original_class(current)
    takes = inspect.signature(cls).parameters
    # spelled out, since from_config gives a class its own defaults where the other one had its
    noise = {name: current.config[name] for name in _NOISE if name in takes and name in current.config}
    options = {**noise, **row.scheduler_options}
    if "clip_sample" in takes:
        options.setdefault("clip_sample", False)
    wanted = row.eta if eta is None else eta
    if "eta" in takes and wanted is not None:
        options["eta"] = wanted
    scheduler = build(cls, pipe, **options)
    if isinstance(scheduler, scheduler_class("ListedDDIMScheduler")):
        _same_levels(scheduler, current)
    check(scheduler, current, pipe)
    if "beta_schedule" not in row.scheduler_options:  # whose weights bring noise levels of their own
        _check_noise(scheduler, current, row)
    return scheduler


def _same_levels(scheduler: Any, current: Any) -> None:
    """Give DDIM the levels of the model's own scheduler, which may have changed them (CogVideoX does)."""
    levels = getattr(current, "alphas_cumprod", None)
    if levels is None or levels.shape != scheduler.alphas_cumprod.shape:
        return
    scheduler.alphas_cumprod = levels.clone()
    if not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = levels[0].clone()


def takes_eta(scheduler: Any) -> bool:
    """Whether a scheduler's step has an argument eta."""
    return "eta" in inspect.signature(original_class(scheduler).step).parameters


def _check_noise(scheduler: Any, current: Any, row: Row) -> None:
    """Raise ValueError unless both have the noise levels that the model was trained with."""
    new, old = (getattr(each, "alphas_cumprod", None) for each in (scheduler, current))
    if new is None or old is None:
        return
    if new.shape != old.shape or not torch.allclose(new.cpu(), old.cpu(), rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{row.name}: {type(current).__name__} has noise levels that its configuration does not tell: "
            "give the pipeline a scheduler whose betas are in its configuration"
        )
