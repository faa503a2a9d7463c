"""Samplers by their short names: registered ones, presets on any grid, Diffusers' own, files.

dc-solver, solver, ...      a registered sampler; on a model that searched solvers come with, those
dpm++@karras                a preset of `PRESETS` on a grid of `GRIDS`, run as a table
ddim, euler-a, ...          Diffusers' own scheduler
six.json, ratios.npy        a searched schedule, or compensation ratios
six                         such a file, where `named_files` gave it this name
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffplug.files import read_json
from diffplug.loading import embedded_name
from diffplug.registry import SAMPLERS, unknown
from diffplug.samplers import named_files

__all__ = ["names", "sampler"]

_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_PRESETS = ("ddim", "deis", "dpm++", "ipndm", "res_multistep", "singlestep", "unipc")  # without loading them


def names() -> list[str]:
    """Return every name that `sampler` knows, those without a grid only."""
    return sorted({*SAMPLERS.names(), *_DIFFUSERS, *_PRESETS, *named_files.named()})


def sampler(name: str, pipe: Any, steps: int | None = None) -> Any:
    """Return what to plug into `pipe` for a name: a scheduler class, an instance with options, or a plug.

    name: as listed above; a preset without a grid runs on the pipeline's own, unless Diffusers has a
    scheduler of that name. steps: of the calls to come, where they are known; then only the files for so many
    are read. Raises ValueError with the nearest names for an unknown one, and OSError for a file that cannot
    be read.
    """
    if name.endswith((".json", ".npy")):
        return _from_file(name)
    if (file := named_files.file_of(name)) is not None:
        return _from_file(file)
    if is_few_step(name):
        return _few_step(name, steps)
    if "@" in name:
        return _on_grid(name)
    if name in SAMPLERS:
        return _shipped(name, pipe, steps) or SAMPLERS.get(name)
    if name in _DIFFUSERS:
        return _of_diffusers(name, pipe)
    if name in _PRESETS:
        return _on_grid(name)
    hint = "A preset goes on a grid as in dpm++@karras; few-step recipes: diffplug names --few-step."
    raise unknown("sampler", name, names(), hint)


def is_few_step(name: str) -> bool:
    """Return whether a name is a few-step checkpoint's ("hyper-sd@4"), or a folder with the recipe of one."""
    if name.endswith((".json", ".npy")) or name in names():
        return False
    from diffplug.samplers.few_step.lookup import knows

    return Path(name, "recipe.json").is_file() or bool(knows(name))


def told_steps(name: str) -> int | None:
    """Return the steps that a name says: "hyper-sd@4" four; a recipe's folder, if it is for one number."""
    if not is_few_step(name):
        return None
    from diffplug.samplers.few_step.catalogue import Row
    from diffplug.samplers.few_step.lookup import split

    if not Path(name).is_dir():
        steps: int | None = split(name)[1]
        return steps
    row = Row.load(name)
    return row.default_steps if len(row.steps) == 1 else None


def _few_step(name: str, steps: int | None) -> Any:
    """Return the plug of a few-step checkpoint; a bare name takes the steps of the calls to come."""
    from diffplug.samplers.few_step import named

    bare = not Path(name).is_dir() and told_steps(name) is None
    return named(f"{name}@{steps}" if bare and steps is not None else name)


def _on_grid(name: str) -> Any:
    """Return the plug of a preset, NAME or NAME@GRID; ValueError with the nearest of either."""
    from diffplug.samplers.schedule.grids import GRIDS
    from diffplug.samplers.solver.plug import Solver

    preset, _, grid = name.partition("@")
    if preset not in _PRESETS:
        raise unknown("preset", preset, sorted(_PRESETS), f"The sampler {name!r} reads PRESET@GRID.")
    if grid and grid not in GRIDS:
        raise unknown("grid", grid, sorted(GRIDS), f"The sampler {name!r} reads PRESET@GRID.")
    return Solver(solver=preset, **({"grid": grid} if grid else {}))


def _of_diffusers(name: str, pipe: Any) -> Any:
    import diffusers

    from diffplug.scheduler.plug import build

    class_name, options = _DIFFUSERS[name]
    cls = getattr(diffusers, class_name)
    return build(cls, pipe, **options) if options else cls


def _from_file(path: str) -> Any:
    """Return the plug for a file: DC-Solver for ratios, FewStep for a recipe, else a schedule."""
    from diffplug import samplers

    document = None if path.endswith(".npy") else read_json(path)
    if isinstance(document, dict) and document.get("format") == "few-step-recipe":
        return samplers.FewStep(path)
    schedule = isinstance(document, dict) and document.get("format") != "compensation-polynomial"
    return samplers.Solver(path) if schedule else samplers.DCSolver(path)


def _shipped(name: str, pipe: Any, steps: int | None) -> Any:
    """Return the plug of the searched solvers that come with the package for this very model, or None."""
    model = embedded_name(pipe)
    if model is None or name not in _SEARCHED:
        return None
    from diffplug import samplers
    from diffplug.samplers.dc_solver.ratios import RatioBook
    from diffplug.samplers.library import shipped_folder, shipped_schedules

    if not list(shipped_folder(model).glob(_SEARCHED[name])):
        return None
    if name == "dc-solver":
        return samplers.DCSolver(RatioBook.shipped(model, steps), elsewhere="neutral")
    return samplers.Solver(shipped_schedules(model, steps) or model, solver="unipc")


_SEARCHED = {"dc-solver": "ratios-*.json", "solver": "solver-*.json"}
