"""Where a pipeline would end with many evaluations: the target of every search, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.network_cache import digest
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import conditioning_fingerprint, fingerprint

__all__ = ["cache_folder", "fingerprint", "truth"]

VERSION = 1


def truth(trials: Rollouts, scheduler: Any, cache: Path | None = None) -> Tensor:
    """The final latents [n, ...] of `trials` with `scheduler`, float64; from `cache` if they are kept there.

    scheduler: a solver with enough steps to have converged; `trials.steps` is its number of steps. cache: a
    folder, `cache_folder()` by default. A file is named by the content of everything that the latents depend
    on: model and encoders, prompts, seeds, steps, guidance, options of the call, the scheduler's
    configuration.

    Raises ValueError for a file that is damaged or holds something else, which is not overwritten, and for
    latents that are not finite, which are not written.
    """
    told = {
        "version": VERSION,
        "model": fingerprint(trials.pipe),
        "conditioning": conditioning_fingerprint(trials.pipe),
        "prompts": list(trials.prompts),
        "seeds": list(trials.seeds),
        "steps": trials.steps,
        "guidance": trials.guidance,
        "options": {name: digest(value).hex() for name, value in trials.options.items()},
        "scheduler": {type(scheduler).__name__: _settings(scheduler)},
    }
    text = json.dumps(told, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = (cache_folder() if cache is None else Path(cache)) / f"truth-{name}.safetensors"
    if path.exists():
        return _read(path, text, len(trials.prompts))
    latents = trials.final(scheduler)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the converged run of {trials.steps} evaluations gives latents that are not finite: use a wider "
            "dtype (float32, bfloat16), a smaller guidance, or other steps"
        )
    output_folder(path.parent)
    with atomic_path(path) as temporary:
        save_file({"latents": latents.contiguous()}, temporary, metadata={"told": text})
    return latents


def _settings(scheduler: Any) -> dict[str, str]:
    """The configuration without Diffusers' own notes, one of which is in another order in every process."""
    return {name: repr(value) for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def cache_folder() -> Path:
    """$DIFFPLUG_CACHE, or `diffplug` in the system's folder for caches ($XDG_CACHE_HOME, ~/.cache)."""
    if named := os.environ.get("DIFFPLUG_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffplug"


def _read(path: Path, text: str, n: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            latents, told = file.get_tensor("latents"), (file.metadata() or {}).get("told")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the truth in {str(path)!r} cannot be read ({error}): remove the file") from error
    if told != text or len(latents) != n:
        raise ValueError(f"{str(path)!r} holds the truth of something else: remove the file")
    if not torch.isfinite(latents).all():
        raise ValueError(f"{str(path)!r} holds latents that are not finite: remove the file")
    return latents.double()
