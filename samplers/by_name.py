"""Short names for Diffusers' own schedulers, for the command line and for comparisons."""

from __future__ import annotations

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

    Registered names come first; the path of a `.json` or `.npy` file is a searched schedule, or compensation
    ratios. On a model that searched solvers come with, "dc-solver" and "solver" take those. Raises ValueError
    with the nearest names for an unknown one, and OSError for a file that cannot be read.
    """
    if name.endswith((".json", ".npy")):
        return _from_file(name)
    if name in SAMPLERS:
        return _shipped(name, pipe) or SAMPLERS.get(name)
    if name not in _STOCK:
        raise unknown("sampler", name, names())
    import diffusers

    class_name, options = _STOCK[name]
    cls = getattr(diffusers, class_name)
    return cls.from_config(pipe.scheduler.config, **options) if options else cls


def _from_file(path: str) -> Any:
    """The plug for a file: DC-Solver for ratios and polynomials, else a schedule."""
    from diffplug import samplers

    document = None if path.endswith(".npy") else read_json(path)
    schedule = isinstance(document, dict) and document.get("format") != "compensation-polynomial"
    return samplers.Solver(path) if schedule else samplers.DCSolver(path)


def _shipped(name: str, pipe: Any) -> Any:
    """The searched solvers that come with the package for this very model, or None."""
    model = embedded_name(pipe)
    if model is None or name not in _SEARCHED:
        return None
    from diffplug import samplers
    from diffplug.samplers.library import shipped_folder

    if not list(shipped_folder(model).glob(_SEARCHED[name])):
        return None
    if name == "dc-solver":
        return samplers.DCSolver(model, elsewhere="neutral")
    return samplers.Solver(model, solver="unipc")


_SEARCHED = {"dc-solver": "ratios-*.json", "solver": "solver-*.json"}
