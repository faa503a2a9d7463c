"""One random generator for every particle, from those of a call, from attached seeds, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffplug.seeds import attached_seeds, picture_seeds, row_seeds
from diffplug.steering.engine.slots import Slots


def spread_generators(
    generators: Sequence[torch.Generator], groups: int, particles: int
) -> list[torch.Generator]:
    """Return one generator per particle from q per prompt (1 <= q <= k), prompt-major.

    The given ones serve the first q particles of their prompt as they are, so those start like the unsteered
    pictures; the others get generators whose seeds are drawn from a copy of a given one: no given generator
    is advanced. Raises ValueError for a number of them that fits neither, and for two in the same state.
    """
    per_group, rest = divmod(len(generators), groups)
    if rest or not 1 <= per_group <= particles:
        raise ValueError(
            f"{len(generators)} generators for {groups} prompts with {particles} particles each: give one "
            "generator for all, one for each prompt, or one for each particle"
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
        every = [torch.Generator(device).manual_seed(seed) for seed in slots.first(drawn)]
    slots.agree([one.initial_seed() for one in every], "generators")
    return every


def child_seeds(generator: torch.Generator, n: int) -> list[int]:
    """Return n seeds drawn from a copy of the generator, which itself stays where it is."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return torch.randint(2**63 - 1, (n,), generator=copy, device=generator.device).tolist()


def _check_streams(given: Sequence[torch.Generator], prompt: int) -> None:
    """Raise ValueError for two generators of one prompt that would draw the same noise."""
    apart = {id(generator): generator for generator in given}.values()
    if len({generator.get_state().numpy().tobytes() for generator in apart}) < len(apart):
        raise ValueError(
            f"two generators of prompt {prompt} have the same state, so that their particles would be the "
            "same: seed each differently (diffplug.seeds.generators)"
        )


def _block(given: Sequence[torch.Generator], particles: int) -> list[torch.Generator]:
    """Return the generators of one prompt's particles: the given ones, then their children."""
    rounds = -(-particles // len(given)) - 1
    seeds = [child_seeds(generator, rounds) for generator in given]
    children = [
        torch.Generator(given[i].device).manual_seed(seeds[i][j])
        for j in range(rounds)
        for i in range(len(given))
    ]
    return [*given, *children][:particles]
