"""A recipe's pictures, batch by batch: each is handed over when its batch is done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diffplug.call_arguments import asked, asked_guidance
from diffplug.intercept import original_class
from diffplug.messages import reason, shown
from diffplug.network.denoiser import count_network
from diffplug.network.memory import is_out_of_memory, release_memory
from diffplug.plug import plug
from diffplug.watch import CURE, Watch, quiet

if TYPE_CHECKING:
    from diffplug.recipe.recipe import Recipe

__all__ = ["Batch", "batches"]


@dataclass(frozen=True)
class Batch:
    """What one call of the pipeline made: PIL `images`, prompt by prompt, from place `first` on.

    each: pictures of one prompt (1, or all particles). rewards: what each picture reached, None where nothing
    was scored. evaluations: of the network for one prompt, a guided pair counted once. used: what the
    pipeline took where the recipe leaves it the choice. report: of the steerer.
    """

    first: int
    images: list[Any]
    each: int
    rewards: list[float | None]
    evaluations: float
    used: dict[str, Any]
    report: Any = None

    @property
    def prompts(self) -> int:
        """How many prompts these pictures are of."""
        return len(self.images) // self.each


def batches(
    recipe: Recipe,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    max_rows: int = 64,
    wanted: Callable[[slice], bool] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    plugs: Sequence[Any] = (),
) -> Iterator[Batch]:
    """Yield one Batch after the other; the pipeline is between them what it was before.

    max_rows: pictures times particles in a call. When memory runs out, half as many are tried again, with the
    same seeds, and so from then on. Batches begin at fixed places, for the rounding of a picture depends on
    its neighbours: `wanted(places)` may pass over whole batches, and the others stay what they were.
    on_step: told (done, of) after every step; what it raises ends the run. plugs: more of them, beside the
    recipe's own. Raises ValueError where the pipeline does not take what the recipe asks for, and where
    latents or pictures are not finite.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    recipe.check(pipe)
    size, first = max(1, max_rows // recipe.copies), 0
    recipe = _in_slices(recipe, pipe, max_rows)
    with quiet(pipe):
        while first < len(prompts):
            part = slice(first, min(first + size, len(prompts)))
            if wanted is None or wanted(part):
                made = _tried(recipe, pipe, prompts[part], seeds[part], on_step, *plugs)
                if made is None:
                    recipe, size = _less(recipe, pipe, size)
                    continue
                yield replace(made, first=first)
            first = part.stop


def _tried(
    recipe: Recipe, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], on_step: Any, *more: Any
) -> Batch | None:
    """Return a batch, or None where memory ran out; then nothing of it is held any more."""
    try:
        return _made(recipe, pipe, prompts, seeds, on_step, *more)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def _made(
    recipe: Recipe, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], on_step: Any, *more: Any
) -> Batch:
    plugs, watch = recipe.plugs(pipe, seeds), Watch(on_step, particles=recipe.copies)
    call = {**recipe.call_arguments(pipe, prompts), "output_type": "np"}
    with plug(pipe, *plugs, *more, watch), count_network(pipe) as count:
        output = _called(pipe, call, recipe.call)
        used = _used(recipe, pipe, call)
    watch.finish()
    images = _images(pipe, output)
    report = plugs[-1].report if recipe.steer else None
    if noise := getattr(report, "noise", ""):
        used["noise"] = noise
    if why := getattr(report, "why", ""):
        used["why"] = why
    used["width"], used["height"] = size = images[0].size
    if size != (recipe.width or size[0], recipe.height or size[1]):
        warnings.warn(
            f"the pipeline made pictures of {size[0]}x{size[1]} pixels: it rounds sizes", stacklevel=2
        )
    evaluations = count.rows / (2 if guided(pipe, recipe.guidance) else 1) / len(prompts)
    each = len(images) // len(prompts)
    return Batch(0, images, each, _rewards(report, len(images)), evaluations, used, report)


def _called(pipe: Any, call: dict[str, Any], own: Mapping[str, Any]) -> Any:
    """Return what the pipeline gives. Raises ValueError for `own` arguments that it stumbles over."""
    try:
        return pipe(**call)
    except (TypeError, AttributeError, LookupError) as error:
        if not own:
            raise
        given = ", ".join(f"{name}={shown(value)}" for name, value in own.items())
        raise ValueError(
            f"{type(pipe).__name__} fails with {given}: {type(error).__name__}: {reason(error)}"
        ) from error


def _less(recipe: Recipe, pipe: Any, size: int) -> tuple[Recipe, int]:
    """Return the recipe and the number of pictures for calls that need less memory."""
    if size > 1:
        return recipe, -(-size // 2)
    rows = recipe.options.get("network_batch_size") or _rows(recipe, pipe)
    if recipe.steer is None or rows <= 1:
        one = "particle" if recipe.steer else "picture"
        raise MemoryError(
            f"memory ran out on a single {one}: lower width and height, or try --dtype bfloat16, "
            "--offload model, --vae-tiling"
        )
    return replace(recipe, options={**recipe.options, "network_batch_size": -(-rows // 2)}), 1


def _in_slices(recipe: Recipe, pipe: Any, max_rows: int) -> Recipe:
    """Return the recipe with its particles taken to the network in slices where there are more than rows."""
    if recipe.copies <= max_rows or "network_batch_size" in recipe.options:
        return recipe
    rows = max_rows * _rows(recipe, pipe) // recipe.copies
    return replace(recipe, options={**recipe.options, "network_batch_size": rows})


def _rows(recipe: Recipe, pipe: Any) -> int:
    """Return how many rows the denoiser gets for one picture; those of guidance count."""
    guidance = asked_guidance(pipe, recipe.call_arguments(pipe, ["-"]))
    return recipe.copies * (2 if guidance is not None and guidance > 1 else 1)


def _used(recipe: Recipe, pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return what acted in a call where the recipe leaves the choice: ready for JSON."""
    used: dict[str, Any] = {"scheduler": original_class(pipe.scheduler).__name__}
    ran = getattr(pipe, "guidance_scale", None)  # a plug may have had another one than the call's
    guidance = float(ran) if isinstance(ran, (int, float)) else asked_guidance(pipe, call)
    if guidance is not None:
        used["guidance"] = guidance
    if recipe.eta is not None or "eta" in call:
        used["eta"] = asked(pipe, call, "eta")
    if recipe.steer and recipe.options:
        used["options"] = dict(recipe.options)
    return used


def _rewards(report: Any, count: int) -> list[float | None]:
    """Return the reward that each picture handed back has reached."""
    if report is None:
        return [None] * count
    reached = [
        float(report.final_rewards[group, slot])
        for group, slots in enumerate(report.returned)
        for slot in slots
    ]
    return [value if math.isfinite(value) else None for value in reached]


def _images(pipe: Any, output: Any) -> list[Any]:
    """Return the PIL pictures of a call. Raises ValueError where the decoder gave NaN or infinities."""
    from diffusers.utils.pil_utils import numpy_to_pil

    if not hasattr(output, "images"):
        raise ValueError(f"{type(pipe).__name__} makes no single images: recipes are for pictures")
    pictures = np.asarray(output.images, dtype=np.float32)
    bad = int((~np.isfinite(pictures.reshape(len(pictures), -1)).all(1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(pictures)} decoded pictures are not finite: {CURE}")
    return numpy_to_pil(pictures)


def guided(pipe: Any, guidance: float | None) -> bool:
    """Return whether the last call ran a conditional and an unconditional row for each picture."""
    said = getattr(pipe, "do_classifier_free_guidance", None)
    return bool(said) if said is not None else guidance is not None and guidance > 1
