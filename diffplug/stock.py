"""Short names for Diffusers' own schedulers, for the command line and for comparisons."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from diffplug.files import read_json
from diffplug.loading import embedded_name
from diffplug.registry import SAMPLERS, unknown

__all__ = ["names", "sampler"]

_STOCK: dict[str, tuple[str, dict[str, Any]]] = {
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
    "pndm": ("PNDMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def names() -> list[str]:
    """Every name that `sampler` knows: the registered ones and Diffusers' own."""
    return sorted({*SAMPLERS.names(), *_STOCK})


def sampler(name: str, pipe: Any) -> Any:
    """What to plug into `pipe` for a name: a scheduler class, an instance where options matter, or a plug.

    Registered names come first; "hyper-sd@4" is a few-step checkpoint (`diffplug.samplers.FewStep`), as is a
    folder with a recipe.json; the path of a `.json` or `.npy` file is a searched schedule, or compensation
    ratios. On a model that searched solvers come with, "dc-solver" and "solver" take those. Raises ValueError
    with the nearest names for an unknown one, and OSError for a file that cannot be read.
    """
    if name.endswith((".json", ".npy")):
        return _from_file(name)
    if is_few_step(name):
        return import_module("diffplug.samplers.few_step").named(name)
    if name in SAMPLERS:
        return _shipped(name, pipe) or SAMPLERS.get(name)
    if name not in _STOCK:
        raise unknown("sampler", name, names(), "Few-step recipes: diffplug names --few-step.")
    import diffusers

    class_name, options = _STOCK[name]
    cls = getattr(diffusers, class_name)
    return cls.from_config(pipe.scheduler.config, **options) if options else cls


def is_few_step(name: str) -> bool:
    """Whether a name is a few-step checkpoint's ("hyper-sd@4"), or a folder with the recipe of one."""
    if name in SAMPLERS or name in _STOCK or name.endswith((".json", ".npy")):
        return False
    if Path(name, "recipe.json").is_file():
        return True
    return bool(import_module("diffplug.samplers.few_step.lookup").knows(name))


def told_steps(name: str) -> int | None:
    """The number of steps that the name of a few-step checkpoint says, None where it says none."""
    if not is_few_step(name) or Path(name).is_dir():
        return None
    steps: int | None = import_module("diffplug.samplers.few_step.lookup").split(name)[1]
    return steps


def folder_steps(name: str) -> int | None:
    """The default number of steps of a folder's few-step recipe, None for any other name."""
    if not Path(name, "recipe.json").is_file():
        return None
    steps: int = import_module("diffplug.samplers.few_step.catalogue").Row.load(name).default_steps
    return steps


def _from_file(path: str) -> Any:
    """The plug for a file: DC-Solver for ratios and polynomials, a few-step recipe, else a schedule."""
    samplers = import_module("diffplug.samplers")  # a wing, loaded when asked for
    document = None if path.endswith(".npy") else read_json(path)
    if isinstance(document, dict) and document.get("format") == "few-step-recipe":
        return samplers.FewStep(path)
    schedule = isinstance(document, dict) and document.get("format") != "compensation-polynomial"
    return samplers.Solver(path) if schedule else samplers.DCSolver(path)


def _shipped(name: str, pipe: Any) -> Any:
    """The searched solvers that come with the package for this very model, or None."""
    model = embedded_name(pipe)
    if model is None or name not in _SEARCHED:
        return None
    samplers, shipped = (import_module(f"diffplug.samplers{part}") for part in ("", ".shipped"))
    if not list(shipped.shipped_folder(model).glob(_SEARCHED[name])):
        return None
    if name == "dc-solver":
        return samplers.DCSolver(model, elsewhere="neutral")
    return samplers.Solver(model, solver="unipc")


_SEARCHED = {"dc-solver": "ratios-*.json", "solver": "solver-*.json"}
