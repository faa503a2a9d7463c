"""One random generator per picture, so that a picture's noise does not depend on the batch it is made in.

What remains is the rounding of matrix products, which some back ends do differently for other batch sizes.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffplug.call_arguments import count_per_prompt, count_prompts
from diffplug.intercept import (
    PipelineCall,
    StepCall,
    StepInterceptor,
    Undo,
    current_scheduler,
    intercept_call,
    intercept_step,
    interceptors,
    original_class,
)
from diffplug.scheduler.guided_halves import HalvedSteps, steps_both_halves

_LARGEST = 2**63 - 1


def generators(
    seeds: int | Sequence[int], n: int | None = None, device: str | torch.device = "cpu"
) -> list[torch.Generator]:
    """`n` generators, one for each picture: seeded s, s+1, ... for an int, or with the seeds of a sequence.

    n: number of pictures, default one for an int, or as many as there are seeds. device: where the noise is
    drawn; pictures are the same on every machine with the default "cpu".
    ValueError: seeds that are no integers in 0 ... 2^63-1, or more or fewer of them than `n`.
    """
    return [torch.Generator(device).manual_seed(seed) for seed in picture_seeds(seeds, n)]


def picture_seeds(seeds: int | Sequence[int], n: int | None = None) -> list[int]:
    """The seed of each of `n` pictures, by the rule of `generators`."""
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        listed = [_seed(seed) for seed in seeds]
        if n not in (None, len(listed)):
            raise ValueError(f"{len(listed)} seeds were given for {n} pictures: give {n}, or a single int.")
        return listed
    first = _seed(seeds)
    return [_seed(first + index) for index in range(1 if n is None else n)]


def particle_seed(seed: int, particle: int) -> int:
    """The seed of a picture's particle: the picture's own for particle 0, a far away one for the others."""
    if particle == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{particle}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & _LARGEST


@dataclass(frozen=True)
class Seeds:
    """A plug that gives every picture its own generator, for the start noise and for every step.

    seeds: an int s (picture i of a call gets s+i) or one int for each picture of the call. Families that
    never hand a generator to their scheduler (SD3, FLUX, Wan, ...) are covered too. Pictures are counted in
    slot order: `num_images_per_prompt` for the first prompt, then for the second. Where a steerer makes more
    particles than pictures, the first particles of a prompt have its pictures' seeds, the others follow.
    ValueError: bad seeds; a pipeline without a generator; a call with a `generator` of its own.
    """

    seeds: int | Sequence[int]
    device: str = field(default="cpu", kw_only=True)
    slot = "seeds"

    def __post_init__(self) -> None:
        listed = picture_seeds(self.seeds)
        one = not isinstance(self.seeds, Sequence)
        object.__setattr__(self, "seeds", listed[0] if one else tuple(listed))

    def attach(self, pipe: Any) -> Undo:
        """A function that gives the pipeline its own random numbers back."""
        if "generator" not in inspect.signature(pipe.__call__).parameters:
            raise ValueError(
                f"{type(pipe).__name__} takes no generator: it cannot be seeded picture by picture."
            )
        steps = SeededSteps(self)
        undo_steps = intercept_step(current_scheduler(pipe), steps)

        def around(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
            generators = self._generators(call, kwargs)
            if not (steps_both_halves(pipe) and isinstance(generators, list)):
                return steps.run(call, {**kwargs, "generator": generators})
            undo_halves = intercept_step(current_scheduler(pipe), HalvedSteps(len(generators)))
            try:
                return steps.run(call, {**kwargs, "generator": generators})
            finally:
                undo_halves()

        undo_call = intercept_call(pipe, around, innermost=True)

        def undo() -> None:
            undo_call()
            undo_steps()

        return undo

    def _generators(self, call: PipelineCall, kwargs: Mapping[str, Any]) -> Any:
        """One generator for every row of the batch that the pipeline is going to make."""
        if call.asked.get("generator") is not None:
            raise ValueError(
                "The call gives generator=..., and Seeds gives every picture its own: leave one of them out."
            )
        if kwargs.get("generator") is not None:  # another plug's choice
            return kwargs["generator"]
        prompts, wanted = count_prompts(call.asked), count_per_prompt(call.pipe, call.asked)
        rows = count_prompts(kwargs) * count_per_prompt(call.pipe, kwargs)
        seeds = picture_seeds(self.seeds, prompts * wanted)
        return [torch.Generator(self.device).manual_seed(seed) for seed in row_seeds(seeds, prompts, rows)]


class SeededSteps(StepInterceptor):
    """Hands the generators of the call that is running to steps that got none. plug: whose they are."""

    first = True  # steerers see the generators too

    def __init__(self, plug: Seeds | None = None) -> None:
        self.plug = plug
        self.generators: Any = None

    def run(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The pipeline's output, made with `kwargs["generator"]` for its steps too."""
        before, self.generators = self.generators, kwargs["generator"]
        try:
            return call(**kwargs)
        finally:
            self.generators = before

    def on_step(self, call: StepCall) -> Any:
        takes = inspect.signature(original_class(call.scheduler).step).parameters
        if "generator" in takes and self.generators is not None and call.kwargs.get("generator") is None:
            rows = len(call.sample)
            if isinstance(self.generators, list) and len(self.generators) != rows:
                raise ValueError(
                    f"The pipeline steps {rows} rows, but Seeds counted {len(self.generators)} pictures: "
                    "leave Seeds out and give the call its generators (diffplug.seeds.generators)."
                )
            call.kwargs["generator"] = self.generators
        return call.run()


def attached_seeds(pipe: Any) -> Seeds | None:
    """The Seeds that are plugged into a pipeline at present."""
    around = interceptors(current_scheduler(pipe))
    return next((s.plug for s in around if isinstance(s, SeededSteps) and s.plug is not None), None)


def row_seeds(seeds: Sequence[int], prompts: int, rows: int) -> list[int]:
    """The seed of every row of a batch, from the seeds of its pictures; both in prompt-major order.

    With more rows than pictures, the first rows of a prompt are its pictures' own, the rest their particles.
    """
    pictures, block = len(seeds) // prompts, rows // prompts
    if rows % prompts or block < pictures:
        raise ValueError(f"{len(seeds)} pictures of {prompts} prompts do not fit a batch of {rows} rows.")
    return [
        particle_seed(seeds[prompt * pictures + row % pictures], row // pictures)
        for prompt in range(prompts)
        for row in range(block)
    ]


def _seed(seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value <= _LARGEST:
        raise ValueError(f"A seed is an integer from 0 to 2^63-1, not {seed!r}.")
    return value
