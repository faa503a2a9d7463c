"""From the call a person makes of a pipeline to the call that runs k particles for each of its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffplug.checks import check_whole
from diffplug.scheduler.pipeline_quirks import lost_arguments
from diffplug.steering.engine.generators import particle_generators, spread_generators
from diffplug.steering.engine.slots import Slots

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")
_SIZES = ("height", "width", "num_frames")
_REPEATED = ("prompt", "negative_prompt", "class_labels")
_TILING = "Amused"  # repeats all prompts one after the other: given k times each, groups stay together
_IMAGES = ("image", "mask_image")
_CONTROLS = ("control_image",)
_ONE_PICTURE = ("WanImageToVideo", "SkyReelsV2ImageToVideo", "SanaImageToVideo")
"""Pipelines that repeat a picture for their prompts, but not all of it for several videos of one."""
_PICTURE_EACH = ("LTXImageToVideo", "HunyuanVideoImageToVideo", "HunyuanSkyreelsImageToVideo")
"""Pipelines that want a picture for every video, and do not repeat one themselves."""
_TILING_IMAGES = ("StableDiffusionInstructPix2Pix", "StableDiffusionXLInstructPix2Pix", "FluxKontext")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked of a pipeline, and the call that runs the particles.

    groups: P prompts. wanted: pictures per prompt to hand back. prompts: one text per group, None where the
    call has embeddings only. kwargs: arguments of the call with a row for every particle of this process,
    prompt-major. size: height, width and num_frames, as given or by the pipeline's own default.
    """

    groups: int
    wanted: int
    prompts: tuple[str, ...] | None
    output_type: str | None
    kwargs: dict[str, Any]
    size: Mapping[str, Any] = field(default_factory=dict)


def read_request(pipe: Any, kwargs: Mapping[str, Any], slots: Slots) -> Request:
    """Return the request behind a call's arguments (by name, defaults not filled in).

    slots: the particles of every prompt, and which of them are here; where they are shared, every particle
    has a generator of its own, which does not depend on the process that holds it. A pipeline without prompts
    (`batch_size` or neither) has one group. Raises ValueError where more pictures are wanted than there are
    particles, for generators or latents whose number fits neither prompts nor particles, and for given videos
    that cannot be repeated.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    count = count_name(pipe)
    wanted = _wanted(kwargs.get(count, defaults[count]) if count else None, str(count), slots.particles)
    groups, prompts = _groups(kwargs, defaults)
    if count == "batch_size" and wanted % groups == 0:
        wanted //= groups
    given = dict(kwargs) | _repeated(pipe, kwargs, defaults, count, groups, len(slots.own))
    if given.get("latents") is not None:
        _check_latents(given["latents"], groups, slots.particles)
        given["latents"] = given["latents"][slots.mine(range(groups * slots.particles))]
    generator = given.get("generator")
    if slots.every_seed and "generator" in defaults:
        given["generator"] = slots.mine(particle_generators(pipe, generator, groups, wanted, slots))
    elif isinstance(generator, (list, tuple)):
        given["generator"] = spread_generators(generator, groups, slots.particles)
    return Request(
        groups=groups,
        wanted=wanted,
        prompts=prompts,
        output_type=given.get("output_type", defaults.get("output_type")),
        kwargs=given,
        size={name: given.get(name) or _number(defaults.get(name)) for name in _SIZES},
    )


def count_name(pipe: Any) -> str | None:
    """Return the argument that says how many pictures a call makes; None where there is none."""
    known = inspect.signature(type(pipe).__call__).parameters
    return next((name for name in _COUNTS if name in known), None)


def one_each(pipe: Any) -> bool:
    """Return whether a pipeline makes one video for each prompt, whatever its call says.

    Its prompts are given k times instead.
    """
    return not {*_COUNTS}.isdisjoint(lost_arguments(pipe))


def _by_prompts(pipe: Any) -> bool:
    """Return whether prompts have to be given k times, since several videos of one fail or are not made."""
    return one_each(pipe) or type(pipe).__name__.startswith((*_ONE_PICTURE, *_PICTURE_EACH))


def _wanted(asked: Any, count: str, particles: int) -> int:
    """Return how many pictures per prompt a call asks for."""
    wanted = 1 if asked is None else asked
    check_whole(count, wanted)
    if wanted > particles:
        raise ValueError(
            f"{count}={wanted} pictures asked for but only {particles} particles are run: raise "
            f"particles to at least {wanted}"
        )
    return wanted


def _repeated(
    pipe: Any,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    count: str | None,
    groups: int,
    here: int,
) -> dict[str, Any]:
    """Return the arguments that change so that every prompt has `here` consecutive rows."""
    by_count = (
        bool(count)
        and not type(pipe).__name__.startswith(_TILING)
        and not _by_prompts(pipe)
        and given.get("prompt_embeds") is None
    )
    if one_each(pipe) and given.get("video") is not None:
        raise ValueError(
            f"{type(pipe).__name__} makes one video for the video that it is given, so several particles of "
            "it cannot run together: steer the pipeline that starts from noise"
        )
    changed = _multiplied(given, count, groups, here, by_count)
    return changed | _start_images(pipe, given, defaults, groups, here, by_count)


def _number(default: Any) -> int | None:
    """Return the default of an argument where it is a number."""
    return default if isinstance(default, int) else None


def _groups(kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, tuple[str, ...] | None]:
    """Return the number of prompts and their texts."""
    prompt = kwargs.get("prompt")
    if isinstance(prompt, str):
        return 1, (prompt,)
    if prompt is not None and not len(prompt):
        raise ValueError("the steered call has an empty list of prompts: give at least one")
    if prompt is not None:
        return len(prompt), tuple(prompt)
    embeds = kwargs.get("prompt_embeds")
    if embeds is not None:
        return len(embeds), None
    if "prompt" in defaults:
        raise ValueError("the steered call has neither prompt nor prompt_embeds: give one of them")
    labels = kwargs.get("class_labels")
    groups = len(labels) if isinstance(labels, (list, tuple, Tensor)) else 1
    return groups, ("",) * groups


def _multiplied(
    given: Mapping[str, Any], count: str | None, groups: int, particles: int, by_count: bool
) -> dict[str, Any]:
    """Return the arguments that change so that every prompt has `particles` consecutive rows."""
    labels = given.get("class_labels")
    if count == "batch_size" and labels is not None:  # it counts all rows, and wants a label for each
        listed = [labels] if isinstance(labels, int) else labels
        return {count: groups * particles, "class_labels": _repeat(listed, groups, particles)}
    if by_count and count:
        return {count: particles}
    embeds = given.get("prompt_embeds") is not None
    # Some pipelines repeat given embeddings for num_images_per_prompt, some do not: here all agree.
    names = [
        name
        for name in given
        if name in _REPEATED or (embeds and ("prompt" in name or "encoder_hidden_states" in name))
    ]
    repeated = {n: _repeat(given[n], groups, particles) for n in names if given[n] is not None}
    return repeated | ({count: 1} if count else {})


def _start_images(
    pipe: Any,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    groups: int,
    particles: int,
    by_count: bool,
) -> dict[str, Any]:
    """Return pictures given for several prompts, each k times in a row.

    Done for pipelines that tile them (one after the other, k times over, so that they meet other prompts),
    and for all where prompts are repeated here instead of by the pipeline.
    """
    if groups == 1:
        each = one_each(pipe) or type(pipe).__name__.startswith(_PICTURE_EACH)
        return _lone_image(given, particles) if each else {}
    tiled = "strength" in defaults or type(pipe).__name__.startswith(_TILING_IMAGES)
    names = (_IMAGES if tiled else ()) if by_count else (*_IMAGES, *_CONTROLS)
    several = hasattr(getattr(pipe, "controlnet", None), "nets")  # one entry, or list, for each of them
    found: dict[str, Any] = {}
    for name in names:
        value = given.get(name)
        if several and isinstance(value, list) and (name in _CONTROLS or "strength" not in defaults):
            found[name] = [_repeat(one, groups, particles) for one in value]
        elif value is not None:
            found[name] = _repeat(value, groups, particles)
    return found


def _lone_image(given: Mapping[str, Any], particles: int) -> dict[str, Any]:
    """Return the start image of a single prompt, once for every row."""
    image = given.get("image")
    if image is None or (isinstance(image, Tensor) and image.ndim > 3 and len(image) != 1):
        return {}
    if isinstance(image, (list, tuple)) or (isinstance(image, Tensor) and image.ndim > 3):
        return {"image": _repeat(image, 1, particles)}
    return {"image": [image] * particles}


def _repeat(value: Any, groups: int, k: int) -> Any:
    """Return per-prompt values with each entry k times in a row; a lone text once for every row."""
    if isinstance(value, Tensor) and value.ndim and len(value) == groups:
        return value.repeat_interleave(k, dim=0)
    if isinstance(value, (list, tuple)) and len(value) == groups:
        return [item for item in value for _ in range(k)]
    return [value] * (groups * k) if isinstance(value, str) else value


def _check_latents(latents: Any, groups: int, particles: int) -> None:
    """Raise ValueError unless given start noise has a row for every particle."""
    if len(latents) != groups * particles:
        raise ValueError(
            f"latents have {len(latents)} rows, but {groups} prompts with {particles} particles each "
            "start from "
            f"{groups * particles}: give one row for every particle, prompt by prompt"
        )
