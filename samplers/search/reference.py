"""Where a pipeline would end with many evaluations: the target of every search, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.network.cache import digest
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import conditioning_fingerprint, fingerprint
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.problem import Run

__all__ = ["cache_folder", "fingerprint", "flat", "reference_solution", "refined", "stacked", "states_of"]

Floats = npt.NDArray[np.float64]
VERSION = 1


def refined(
    schedule: SolverSchedule, levels: NoiseLevels, evaluations: int, order: int = 3
) -> SolverSchedule:
    """Return DPM-Solver++ over the schedule's own nodes and as many more, evenly between them in time.

    The nodes of `schedule` are every m-th of the result, m = ceil(evaluations / steps).
    """
    nodes = schedule.nodes.sigmas(levels, len(schedule.steps))
    times = np.append(levels.time_of_sigma(nodes[:-1]), 0.0)
    if nodes[-1] > 0:
        times[-1] = levels.time_of_sigma(nodes[-1:])[0]
    m = -(-evaluations // len(schedule.steps))
    fine = np.concatenate([np.linspace(a, b, m, endpoint=False) for a, b in pairwise(times)])
    sigmas = np.append(fine / levels.train_steps if levels.flow else levels.sigma_of_time(fine), nodes[-1])
    sigmas[::m] = nodes
    return dpmpp(
        len(sigmas) - 1,
        Nodes(kind="sigmas", values=tuple(sigmas.tolist())),
        order=order,
        true_third=order == 3,
        lower_order_final=False,
    )


def states_of(fine: Run, schedule: SolverSchedule) -> Floats:
    """Return the states [N + 1, n, d] at a schedule's nodes of a run of what `refined` made of it."""
    every = len(fine.states) // len(schedule.steps)
    return np.concatenate([fine.states[::every], fine.final[None]])


def reference_solution(rollouts: Rollouts, scheduler: Any, cache: Path | None = None) -> Tensor:
    """Return the final latents [n, ...] of a converged solver, float64; from `cache` if they are kept there.

    scheduler: a solver with enough steps to have converged; `rollouts.steps` is its number of steps. cache: a
    folder, `cache_folder()` by default. A file is named by the content of everything that the latents depend
    on: model and encoders, prompts, seeds, steps, guidance, options of the call, the scheduler's
    configuration. A folder that cannot be written to costs a warning: the latents are there.

    Raises ValueError for a file that is damaged or holds something else, which is not overwritten, and for
    latents that are not finite, which are not written.
    """
    text = json.dumps(_depends_on(rollouts, scheduler), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = cache_folder(cache) / f"truth-{name}.safetensors"
    if path.exists():
        return _read(path, text, len(rollouts.prompts))
    latents = rollouts.final(scheduler)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the converged run of {rollouts.steps} evaluations gives latents that are not finite: use a "
            "wider dtype (float32, bfloat16), a smaller guidance, or other steps"
        )
    try:
        output_folder(path.parent)
        with atomic_path(path) as temporary:
            save_file({"latents": latents.contiguous()}, temporary, metadata={"told": text})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the converged latents are not kept, and computed again next time: {error}", stacklevel=2
        )
    return latents


def _depends_on(rollouts: Rollouts, scheduler: Any) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": fingerprint(rollouts.pipe),
        "conditioning": conditioning_fingerprint(rollouts.pipe),
        "prompts": list(rollouts.prompts),
        "seeds": list(rollouts.seeds),
        "steps": rollouts.steps,
        "guidance": rollouts.guidance,
        "options": {name: digest(value).hex() for name, value in rollouts.options.items()},
        "scheduler": {type(scheduler).__name__: _settings(scheduler)},
    }


def _settings(scheduler: Any) -> dict[str, str]:
    """Return the configuration without Diffusers' own notes, whose order differs between processes."""
    return {name: repr(value) for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def cache_folder(given: Path | None = None) -> Path:
    """Return the given folder, $DIFFPLUG_CACHE, or `diffplug` in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return Path(given)
    if named := os.environ.get("DIFFPLUG_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffplug"


def _read(path: Path, text: str, n: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            latents, known = file.get_tensor("latents"), (file.metadata() or {}).get("told")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the truth in {str(path)!r} cannot be read ({error}): remove the file") from error
    if known != text or len(latents) != n:
        raise ValueError(f"{str(path)!r} holds the truth of something else: remove the file")
    if not torch.isfinite(latents).all():
        raise ValueError(f"{str(path)!r} holds latents that are not finite: remove the file")
    return latents.double()


def flat(x: Tensor) -> Floats:
    """Return [n, d] of [n, ...], float64."""
    return torch.as_tensor(x).cpu().double().reshape(len(x), -1).numpy()


def stacked(parts: list[Tensor]) -> Floats:
    """Return [k, n, d] of k tensors [n, ...]."""
    return np.stack([flat(part) for part in parts])
