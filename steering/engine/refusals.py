"""Pipelines that cannot be steered at their scheduler, each with the reason."""

from __future__ import annotations

from typing import Any

from diffplug.intercept import interceptors
from diffplug.network.denoiser import denoisers
from diffplug.steering.engine.step import ParticleSteps

_CHUNKS = "it denoises in chunks, and earlier chunks stay in their rows while particles move"
_EDITS = "it replays stored noise of one given picture, which leaves nothing to draw"
_REFUSED = {
    "LLaDA2": "it merges every step's block with one that was not selected",
    "DiffusionGemma": "earlier canvases and its key-value cache stay in their rows while particles move",
    "SkyReelsV2DiffusionForcing": _CHUNKS,
    "HunyuanVideoFramepack": _CHUNKS,
    "AnyFlowFAR": _CHUNKS,
    "LTXI2VLongMultiPrompt": _CHUNKS,
    "Helios": _CHUNKS,
    "LEditsPP": _EDITS,
    "CycleDiffusion": _EDITS,
    "SemanticStableDiffusion": "the momentum of its edits stays in its row while particles move",
    "StableDiffusionPanorama": "it steps windows of one picture, not pictures",
    "Marigold": "it estimates depth, normals or materials of a given picture, it draws none",
    "Onnx": "its steps are NumPy arrays, not tensors",
}


_STEPS_TWICE = ("CosmosTextToWorld", "CosmosVideoToWorld")
"""Pipelines that step both halves of guidance, take the step back, and step again."""


def refuse_pipeline(pipe: Any, *, copies: bool = True) -> None:
    """Raise ValueError, with the reason, for a pipeline without a scheduler, and for one whose particles
    cannot be moved there; copies: whether that is going to happen.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(_without_scheduler(pipe))
    if type(pipe).__name__.startswith(_STEPS_TWICE):
        raise ValueError(
            f"{type(pipe).__name__} cannot be steered: it steps its scheduler twice at every timestep, once "
            "for both halves of guidance; draw several videos and choose, or take Cosmos 2 or 2.5"
        )
    for cls in type(pipe).__mro__ if copies else ():
        for name, reason in _REFUSED.items():
            if cls.__name__.startswith(name):
                raise ValueError(
                    f"particles of {type(pipe).__name__} cannot be copied: {reason}; try BestOfN, which "
                    "copies none"
                )


def _without_scheduler(pipe: Any) -> str:
    """Return why a pipeline without `pipe.scheduler` cannot be steered."""
    names = sorted({*getattr(pipe, "components", {}), *getattr(pipe, "__dict__", {})} - {"_scheduler"})
    several = [name for name in names if name.endswith("scheduler") and getattr(pipe, name, None) is not None]
    if several:
        return (
            f"{type(pipe).__name__} denoises with {len(several)} schedulers ({', '.join(several)}), and "
            "a plug moves particles at one, where the parts of the other would stay behind: write its loop "
            "out and steer that (steerer.crowd, docs/crowd.md), or draw several results and choose"
        )
    return f"{type(pipe).__name__} has no scheduler: only pipelines that denoise can be steered"


def refuse_second_run(pipe: Any) -> None:
    """Raise ValueError where a steered run at the pipeline's scheduler is still under way.

    That is a reward which calls its own steered pipeline, another thread, or another pipeline that shares the
    scheduler object.
    """
    if any(isinstance(one, ParticleSteps) for one in interceptors(pipe.scheduler)):
        raise ValueError(
            f"the {type(pipe.scheduler).__name__} of this {type(pipe).__name__} is in a steered run already: "
            "a reward must not call the pipeline that it steers, and threads and pipelines need a scheduler "
            "each (they may share the weights)"
        )


def refuse_caches(pipe: Any) -> None:
    """Raise ValueError if a denoiser caches features: those stay in their slots while particles move."""
    try:
        networks = denoisers(pipe)
    except ValueError:
        return
    for network in networks:
        if getattr(network, "is_cache_enabled", False):
            raise ValueError(
                f"{type(network).__name__} caches features per row, which selection would mix up: call "
                "its disable_cache() first"
            )
