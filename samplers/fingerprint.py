"""Which model a searched file was made for, and whether a pipeline is that model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from diffplug.checks import finite
from diffplug.messages import shown
from diffplug.network.denoiser import denoisers
from diffplug.samplers.network_weights import NetworkWeights, tensors

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

    Fine-tunes, adapters while they act, another dtype and quantisation change it; the machine, the device,
    compilers, fused projections, offloading and adapters that are off do not.
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
        weights = NetworkWeights.of(module)
        for name, value in (*sorted(weights.base.items()), *sorted(weights.adapters.items())):
            for part in (value,) if type(value) is torch.Tensor else tensors(value):
                if isinstance(part, str):
                    digest.update(f"{name}{part}".encode())
                    continue
                flat = part.detach().reshape(-1)
                some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
                digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
                digest.update(some.view(torch.uint8).numpy().tobytes())
        if weights.adapters:
            digest.update(_strengths(module).encode())
    return digest.hexdigest()[:32]


def _strengths(module: Any) -> str:
    """How strongly the adapters of a network act, in words."""
    scales = [getattr(each, "scaling", None) or getattr(each, "scale", None) for each in _acting(module)]
    return repr([scale for scale in scales if isinstance(scale, (dict, list, float, int))])


def _acting(module: Any) -> Iterator[Any]:
    for each in module.modules():
        if hasattr(each, "adapter_layer_names") or hasattr(each, "to_k_ip"):
            yield each


def architecture(pipe: Any) -> str:
    """A hash of the denoisers' weights by name and shape.

    Fine-tunes, dtypes, adapters, compilers, fused projections, offloading and quantisation leave it alone.
    """
    names = [
        f"{name}{shape}"
        for module in denoisers(pipe)
        for name, shape in sorted(NetworkWeights.of(module).shapes().items())
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
        here = fingerprint(pipe)
        shape = "" if all(meta["model"] == here for meta in known) else architecture(pipe)
    except (NotImplementedError, RuntimeError):  # weights that are elsewhere, as with offloading to disk
        return
    one = what == "schedule"
    for meta in known:
        if meta["model"] == here:
            continue
        if meta.get("architecture", shape) != shape:
            raise ValueError(
                f"the {what} for {shown(meta.get('steps'))} steps belong{'s' if one else ''} to another "
                f"model than this {type(pipe).__name__}: search your own (diffplug search)"
            )
        warnings.warn(
            f"the {what} for {shown(meta.get('steps'))} steps {'was' if one else 'were'} searched for other "
            f"weights (model {str(meta['model'])[:8]}, this is {here[:8]}): search again for the best result",
            stacklevel=4,
        )
        return
