"""Short names for Diffusers' own schedulers, for the command line and for comparisons."""

from __future__ import annotations

from importlib import import_module
from typing import Any

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
    """What to plug into `pipe` for a name: a scheduler class, or an instance where options are needed.

    Registered names come first; the path of a `.json` file is a searched schedule. Raises ValueError with the
    nearest names for an unknown one, and OSError for a file that cannot be read.
    """
    if name.endswith(".json"):
        return import_module("diffplug.samplers.solver_plug").Solver(name)  # a wing, loaded when asked for
    if name in SAMPLERS:
        return SAMPLERS.get(name)
    if name not in _STOCK:
        raise unknown("sampler", name, names())
    import diffusers

    class_name, options = _STOCK[name]
    cls = getattr(diffusers, class_name)
    return cls.from_config(pipe.scheduler.config, **options) if options else cls
