"""Which model a searched file was made for, and whether a pipeline is that model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffplug.checks import finite
from diffplug.denoiser import denoisers

__all__ = [
    "architecture",
    "check_origin",
    "conditioning_fingerprint",
    "fingerprint",
    "made_for_guidance",
]

SAMPLED = 4096  # elements of each weight that enter the fingerprint


def fingerprint(pipe: Any) -> str:
    """A hash of the denoisers: name, shape, type and up to 4,096 evenly spaced elements of every weight.

    Fine-tunes, merged adapters and another dtype change it; the machine and the device do not.
    """
    return _hash(denoisers(pipe))


def conditioning_fingerprint(pipe: Any) -> str:
    """Such a hash of the other networks, which decide what a run is told: encoders, control networks."""
    networks = {id(module) for module in denoisers(pipe)}
    parts = sorted((name, part) for name, part in pipe.components.items() if name != "safety_checker")
    return _hash(part for _, part in parts if isinstance(part, torch.nn.Module) and id(part) not in networks)


def _hash(modules: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in sorted(module.state_dict().items()):
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def architecture(pipe: Any) -> str:
    """A hash of the denoisers' weights by name and shape: fine-tunes, dtypes and adapters leave it alone."""
    names = [
        f"{name.replace('.base_layer', '')}{tuple(weight.shape)}"
        for module in denoisers(pipe)
        for name, weight in sorted(module.state_dict().items())
        if "lora_" not in name
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def made_for_guidance(meta: Mapping[str, Any]) -> float | None:
    """The guidance scale that a file was searched at, None where it does not say.

    Raises ValueError for one that is no finite number.
    """
    scale = meta.get("guidance_scale")
    return None if scale is None else finite("guidance_scale in the meta", scale)


def check_origin(what: str, metas: Iterable[Mapping[str, Any]], pipe: Any) -> None:
    """Nothing where a pipeline is the model that files were made for, or where they do not say.

    what: "schedule" or "ratios". Warns (UserWarning) where only the weights differ, as after training.
    Raises ValueError for another architecture: numbers of one model mean nothing on another.
    """
    known = [meta for meta in metas if meta.get("model")]
    if not known:
        return
    try:
        here, shape = fingerprint(pipe), architecture(pipe)
    except (NotImplementedError, RuntimeError):  # weights that are elsewhere, as with offloading to disk
        return
    for meta in known:
        if meta["model"] == here:
            continue
        if meta.get("architecture", shape) != shape:
            raise ValueError(
                f"the {what} for {meta.get('steps')} steps belong to another model than this "
                f"{type(pipe).__name__}: search your own (diffplug search)"
            )
        warnings.warn(
            f"the {what} for {meta.get('steps')} steps were searched for other weights "
            f"(model {meta['model'][:8]}, this is {here[:8]}): search again for the best result",
            stacklevel=4,
        )
        return
