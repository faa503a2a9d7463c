"""Pipelines put where they run: device, dtype, and how to make do with less memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import diffplug
from diffplug.messages import reason
from diffplug.registry import unknown

__all__ = ["Memory", "device_of", "dtype_of", "hush", "placed"]


@dataclass(frozen=True)
class Memory:
    """How to make do with less memory: weights that wait on the host, a decoder that works in parts."""

    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False

    def __post_init__(self) -> None:
        if self.offload not in _OFFLOADS:
            raise unknown("offload", self.offload, list(_OFFLOADS))

    def place(self, pipe: Any, where: str) -> Any:
        """Return the pipeline on its device, as sparing as asked for."""
        for wanted, name in ((self.vae_tiling, "tiling"), (self.vae_slicing, "slicing")):
            if wanted:
                _spare_decoder(pipe, name)
        if self.offload == "none":
            return pipe.to(where)
        if where == "cpu":
            raise ValueError(
                f"--offload {self.offload} moves weights to an accelerator and back: leave it out on cpu"
            )
        getattr(pipe, _OFFLOADS[self.offload])(device=where)
        return pipe


_OFFLOADS = {
    "none": "",
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}


def _spare_decoder(pipe: Any, name: str) -> None:
    enable = getattr(getattr(pipe, "vae", None), f"enable_{name}", None)
    if enable is None:
        raise ValueError(f"--vae-{name}: {type(pipe).__name__} has no decoder that can do it: leave it out")
    enable()


def placed(model: str, device: str, dtype: str, memory: Memory | None = None) -> Any:
    """Return the pipeline of that name on its device, in its dtype, as sparing of memory as asked for.

    device, dtype: "auto" leaves the choice to `device_of` and `dtype_of`. Raises ValueError for names that
    are not known, a device that cannot be used here, and what the pipeline cannot do.
    """
    where = device_of(device)
    pipe = diffplug.load(model, **_dtype(dtype_of(dtype, model, where)))
    return (memory or Memory()).place(pipe, where)


def dtype_of(name: str, model: str, where: str) -> str:
    """Return the dtype's name; auto is bfloat16 where the model is not small."""
    known = ["auto", "bfloat16", "float16", "float32"]
    if name not in known:
        raise unknown("dtype", name, known)
    small = model == "shapes" or where == "cpu"
    return {"auto": "float32" if small else "bfloat16"}.get(name, name)


def _dtype(name: str) -> dict[str, Any]:
    """Return what `load` needs to know: nothing for float32."""
    import torch

    return {} if name == "float32" else {"dtype": getattr(torch, name)}


def device_of(name: str) -> str:
    """Return a device that can be used here. Raises ValueError for others."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        why = reason(RuntimeError(str(error).strip().split(". ")[0]))
        raise ValueError(
            f"device {name[:80]!r} cannot be used here ({why}): take auto, cpu, cuda, cuda:1 or mps"
        ) from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers: take auto, cpu, cuda or mps")
    return name


def hush() -> None:
    """Turn off the progress bars and notices of the libraries below, for this process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
