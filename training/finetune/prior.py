"""What a model should not forget: pictures of the old domain that are trained on beside the new ones.

They are pictures with captions in a folder (replay), or are drawn once by the model itself from prompts of
the old domain (prior preservation, arXiv 2208.12242), and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.plug import plug
from diffplug.samplers.fingerprint import fingerprint
from diffplug.seeds import Seeds
from diffplug.training.conditions import Conditions
from diffplug.training.data import DataSettings, prompts_of
from diffplug.training.finetune.buckets import Size
from diffplug.training.finetune.pictures import (
    Bucket,
    bucketed,
    captions_of,
    conditions_of,
    pixel_step,
    read_buckets,
)
from diffplug.watch import quiet

__all__ = ["prior_buckets", "prior_prompts"]

_ROWS = 16  # pictures that are drawn at once


def prior_prompts(prior: str, count: int, pipe: Any) -> list[str]:
    """Return `count` prompts of the old domain: of a file, of "shapes:train", or one again and again."""
    if Path(prior).is_file() or prior.startswith("shapes:"):
        found = prompts_of(DataSettings(prompts=prior, count=count), pipe)
    elif Path(prior).suffix or "/" in prior:
        raise ValueError(f"objective.prior: there is no file or folder {prior!r}: give one, or a prompt")
    else:
        found = [prior]
    return [found[i % len(found)] for i in range(count)]


def prior_buckets(
    pipe: Any,
    prior: str,
    *,
    count: int,
    size: int,
    square: bool,
    guidance: float | None,
    steps: int,
    seed: int,
    cache: Path,
    call: Mapping[str, Any],
    on_part: Callable[[int], None] = lambda n: None,
) -> list[Bucket]:
    """Return the pictures that preserve the old domain, in buckets of their sizes.

    prior: a folder of pictures with captions; or prompts (see `prior_prompts`) of which `count` pictures are
    drawn in `steps` steps at `guidance`, before anything is trained.
    """
    if Path(prior).is_dir():
        groups = bucketed(captions_of(Path(prior)), size, pixel_step(pipe), square=square)
        return read_buckets(pipe, groups, cache / "latents", call, on_part)
    prompts = prior_prompts(prior, count, pipe)
    told = {**call, **_sized(pipe, (size, size)), "num_inference_steps": steps}
    if guidance is not None:
        told["guidance_scale"] = guidance
    key = json.dumps([fingerprint(pipe), prompts, seed, {k: str(v) for k, v in told.items()}])
    file = output_folder(cache / "prior") / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    latents = _drawn(pipe, prompts, seed, told, file, on_part)
    return [Bucket((size, size), latents, conditions_of(pipe, prompts, (size, size), call), prompts)]


def _sized(pipe: Any, size: Size) -> dict[str, int]:
    import inspect

    known = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in (("width", size[0]), ("height", size[1])) if name in known}


@torch.no_grad()
def _drawn(
    pipe: Any,
    prompts: list[str],
    seed: int,
    told: Mapping[str, Any],
    file: Path,
    on_part: Callable[[int], None],
) -> Tensor:
    """Return the latents that the model draws, from `file` where they were drawn before."""
    from safetensors.torch import load_file, save_file

    if not file.exists():
        parts = []
        for begin in range(0, len(prompts), _ROWS):
            some = prompts[begin : begin + _ROWS]
            with plug(pipe, Seeds([seed + begin + i for i in range(len(some))])), quiet(pipe):
                parts.append(pipe(prompt=some, output_type="latent", **told)[0].float().cpu())
            on_part(len(some))
        with atomic_path(file) as temporary:
            save_file({"latents": torch.cat(parts).contiguous()}, temporary)
    return load_file(file)["latents"]


def null_of(pipe: Any, size: Size, call: Mapping[str, Any]) -> Conditions:
    """Return the condition of an empty prompt, one row, as guidance will ask for it."""
    from diffplug.training.conditions import encode, null_condition

    form = encode(pipe, [""], call=call)[0]
    try:
        return null_condition(pipe, form, call={**call, **_sized(pipe, size)})
    except ValueError:  # a model without guidance of its own
        return conditions_of(pipe, [""], size, call)
