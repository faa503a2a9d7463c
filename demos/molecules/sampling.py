"""Sampling molecules in 25 jumps: a loop of one's own, and the four lines of a crowd in it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from diffplug.demos.molecules.diffusion import STEPS, Denoised, from_prior, plugged_in, step
from diffplug.demos.molecules.graphs import Graphs, molecules
from diffplug.demos.molecules.network import MoleculeNetwork
from diffplug.demos.molecules.rewards import FLOOR
from diffplug.steering import CrowdResult


def times(jumps: int = 25) -> list[float]:
    """Return the times of a run with so many jumps, 100 ... 0. Raises ValueError for fewer than one."""
    if jumps < 1:
        raise ValueError(f"steps={jumps}: give at least 1")
    return [float(t) for t in np.linspace(STEPS, 0, jumps + 1)]


@torch.no_grad()
def sample(
    network: MoleculeNetwork, steerer: Any, *, groups: int, atoms: int = 6, jumps: int = 25, seed: int = 0
) -> CrowdResult:
    """Return steered molecules of so many heavy atoms, `groups` populations of the steerer's particles.

    Results are RDKit molecules, None for those that are none. Raises ValueError for sizes that the network
    does not know, and ImportError without RDKit.
    """
    largest = network.card.largest
    if not 2 <= atoms <= largest:
        raise ValueError(f"atoms={atoms}: this network makes molecules of 2 to {largest} heavy atoms")
    path = times(jumps)
    crowd = steerer.crowd(groups=groups, steps=jumps, seeds=seed, floor=FLOOR)
    state = from_prior(torch.full((crowd.rows,), atoms), largest, network.prior, crowd)
    for i, (t, s) in enumerate(pairwise(path)):
        out = network(state, torch.full((crowd.rows,), t))
        state, out = crowd.at(i, state, out, clean=seen)
        state = step(state, out, t, s, network.prior, crowd)
    return crowd.finish(state, clean=molecules)


def seen(state: Graphs, out: Denoised) -> list[Any]:
    """Return the likeliest molecule of every state, None where it is none."""
    return molecules(plugged_in(state, out))
