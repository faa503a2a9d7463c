"""From the call a person makes of a pipeline to the call that runs k particles for each of its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_whole
from diffplug.seeds import attached_seeds, picture_seeds, row_seeds
from diffplug.steering.engine.ranks import ALONE, Ranks, Slots

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")
_SIZES = ("height", "width", "num_frames")
_REPEATED = ("prompt", "negative_prompt", "class_labels")
_TILING = "Amused"  # repeats all prompts one after the other: given k times each, groups stay together
_IMAGES = ("image", "mask_image")
_CONTROLS = ("control_image",)
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


def read_request(pipe: Any, kwargs: Mapping[str, Any], particles: int, ranks: Ranks | None = None) -> Request:
    """Return the request behind a call's arguments (by name, defaults not filled in).

    ranks: the processes that share the particles; every particle then has a generator of its own, which does
    not depend on the process that holds it. A pipeline without prompts (`batch_size` or neither) has one
    group. Raises ValueError where more pictures are wanted than there are particles, and for generators or
    latents whose number fits neither prompts nor particles.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    count = next((name for name in _COUNTS if name in defaults), None)
    wanted = kwargs.get(count, defaults[count]) if count else None
    wanted = 1 if wanted is None else wanted
    check_whole(str(count), wanted)
    if wanted > particles:
        raise ValueError(
            f"{count}={wanted} pictures asked for but only {particles} particles are run: raise "
            f"particles to at least {wanted}"
        )
    groups, prompts = _groups(kwargs, defaults)
    slots = Slots(particles, ranks or ALONE)
    here = len(slots.own)
    given = dict(kwargs)
    tiles = type(pipe).__name__.startswith(_TILING)
    by_count = bool(count) and not tiles and given.get("prompt_embeds") is None
    given.update(_multiplied(given, count, groups, here, by_count))
    given.update(_start_images(pipe, given, defaults, groups, here, by_count))
    if given.get("latents") is not None:
        _check_latents(given["latents"], groups, particles)
        if here < particles:
            given["latents"] = given["latents"][slots.mine(range(groups * particles))]
    generator = given.get("generator")
    if ranks is not None and "generator" in defaults:
        every = particle_generators(pipe, generator, groups, wanted, slots)
        given["generator"] = slots.mine(every)
    elif isinstance(generator, (list, tuple)):
        given["generator"] = spread_generators(generator, groups, particles)
    output_type = given.get("output_type", defaults.get("output_type"))
    size = {name: given.get(name) or _number(defaults.get(name)) for name in _SIZES}
    return Request(
        groups=groups, wanted=wanted, prompts=prompts, output_type=output_type, kwargs=given, size=size
    )


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
        return {}
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


def spread_generators(
    generators: Sequence[torch.Generator], groups: int, particles: int
) -> list[torch.Generator]:
    """Return one generator per particle from q per prompt (1 <= q <= k), prompt-major.

    The given ones serve the first q particles of their prompt as they are, so those start like the unsteered
    pictures; the others get generators whose seeds are drawn from a copy of a given one: no given generator
    is advanced.
    """
    per_group, rest = divmod(len(generators), groups)
    if rest or not 1 <= per_group <= particles:
        raise ValueError(
            f"{len(generators)} generators for {groups} prompts with {particles} particles each: give "
            "one generator "
            "for all, one for each prompt, or one for each particle"
        )
    blocks = [generators[g * per_group : (g + 1) * per_group] for g in range(groups)]
    for prompt, block in enumerate(blocks):
        _check_streams(block, prompt)
    return [generator for block in blocks for generator in _block(block, particles)]


def particle_generators(
    pipe: Any, generator: Any, groups: int, wanted: int, slots: Slots
) -> list[torch.Generator]:
    """Return a generator for every particle of all processes, prompt-major; each must get the same ones.

    From the list given, else from the `Seeds` of the pipeline, else with seeds that the first process draws
    from the generator given or from the global one. Raises ValueError where the processes disagree.
    """
    k, seeds = slots.particles, attached_seeds(pipe)
    if isinstance(generator, (list, tuple)):
        every = spread_generators(generator, groups, k)
    elif generator is None and seeds is not None:
        rows = row_seeds(picture_seeds(seeds.seeds, groups * wanted), groups, groups * k)
        every = [torch.Generator(seeds.device).manual_seed(seed) for seed in rows]
    else:
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(2**63 - 1, (groups * k,), generator=generator, device=device).tolist()
        every = [torch.Generator(device).manual_seed(s) for s in slots.ranks.everyone(lambda: drawn)[0]]
    slots.ranks.agree([one.initial_seed() for one in every], "generators")
    return every


def _check_streams(given: Sequence[torch.Generator], prompt: int) -> None:
    """Raise ValueError for two generators of one prompt that would draw the same noise."""
    apart = {id(generator): generator for generator in given}.values()
    if len({generator.get_state().numpy().tobytes() for generator in apart}) < len(apart):
        raise ValueError(
            f"two generators of prompt {prompt} have the same state, so that their particles would be the "
            "same: seed each differently (diffplug.seeds.generators)"
        )


def _block(given: Sequence[torch.Generator], particles: int) -> list[torch.Generator]:
    rounds = -(-particles // len(given)) - 1
    seeds = [child_seeds(generator, rounds) for generator in given]
    children = [
        torch.Generator(given[i].device).manual_seed(seeds[i][j])
        for j in range(rounds)
        for i in range(len(given))
    ]
    return [*given, *children][:particles]


def child_seeds(generator: torch.Generator, n: int) -> list[int]:
    """Return n seeds drawn from a copy of the generator, which itself stays where it is."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return torch.randint(2**63 - 1, (n,), generator=copy, device=generator.device).tolist()
