"""Diffusion of molecules: Gaussian on coordinates, categorical on atoms and bonds, jumps of any length.

Everything is closed form. With the signal abar_t and alpha = abar_t / abar_s, a jump s -> t of a category is
Q = alpha I + (1 - alpha) 1 pi^T towards its prior pi (its share among all molecules), and one back is

    q(j | c_t, c_0)  proportional to  Q[j, c_t] (abar_s [j = c_0] + (1 - abar_s) pi_j)

averaged over the network's c_0 (arXiv 2107.03006). Coordinates take the Gaussian posterior of their centred
space. EQGAT-diff (arXiv 2309.17296) diffuses molecules like this, with other schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from diffplug.demos.molecules.graphs import Graphs, centred

STEPS = 100
_OFFSET = 0.008


class Draws(Protocol):
    """Where random numbers come from, a stream for each row; a `Crowd` is one."""

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, `[n, *shape]`."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), `[n, *shape]`."""
        ...


@dataclass(frozen=True)
class Prior:
    """The shares of atom and bond classes among all molecules, `[4]` each: where noise ends."""

    atoms: Tensor
    bonds: Tensor

    @classmethod
    def of(cls, graphs: Graphs) -> Prior:
        """Return the shares in a batch."""
        atoms = F.one_hot(graphs.atoms[graphs.present], 4).double().mean(0)
        bonds = F.one_hot(graphs.bonds[graphs.pairs], 4).double().mean(0)
        return cls(atoms.float(), bonds.float())


@dataclass(frozen=True)
class Denoised:
    """What the network says of a state: clean coordinates `[n, N, 3]`, logits of atoms and bonds."""

    x: Tensor
    atoms: Tensor
    bonds: Tensor


def signal(t: float) -> float:
    """Return abar at t in 0..100 (cosine; arXiv 2102.09672, equation 17)."""
    return _cosine(t) / _cosine(0.0)


def _cosine(t: float) -> float:
    return math.cos((t / STEPS + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2


def jump(alpha: float, prior: Tensor) -> Tensor:
    """Return the chances Q `[k, k]` of a jump that keeps a category with chance alpha; rows sum to one."""
    kept = torch.eye(len(prior), dtype=prior.dtype, device=prior.device)
    return alpha * kept + (1 - alpha) * prior


def posterior(chances: Tensor, now: Tensor, t: float, s: float, prior: Tensor) -> Tensor:
    """Return the chances at s < t of categories `now` at t, `[..., k]` float64.

    chances: `[..., k]` of the clean category.
    """
    prior = prior.double()
    at_t, at_s = signal(t), signal(s)
    likelihood = jump(at_t / at_s, prior).T[now]  # Q[j, now] for every j
    clean = jump(at_s, prior)  # [c_0, j]
    joint = likelihood[..., None, :] * clean
    by_clean = joint / joint.sum(-1, keepdim=True).clamp(min=1e-300)
    return (chances.double()[..., :, None] * by_clean).sum(-2)


def drawn(chances: Tensor, uniform: Tensor) -> Tensor:
    """Return a category for each uniform number, by inverting the distribution `[..., k]`."""
    below = chances.double().cumsum(-1)
    return (uniform.double()[..., None] * below[..., -1:] >= below).sum(-1).clamp(max=chances.shape[-1] - 1)


def symmetric(x: Tensor) -> Tensor:
    """Return a tensor `[n, N, N]` with its upper triangle mirrored: one draw for each pair."""
    upper = x.triu(1)
    return upper + upper.transpose(1, 2)


def from_prior(sizes: Tensor, largest: int, prior: Prior, draws: Draws) -> Graphs:
    """Return pure noise for molecules of these sizes, `[n]`."""
    present = torch.arange(largest) < sizes[:, None]
    atoms = drawn(prior.atoms, draws.uniform(largest)) * present
    empty = Graphs(centred(draws.normal(largest, 3), present), atoms, atoms, present)
    bonds = symmetric(drawn(prior.bonds, draws.uniform(largest, largest))) * empty.pairs
    return replace(empty, bonds=bonds)


def noised(graphs: Graphs, at: Tensor, prior: Prior, draws: Draws) -> Graphs:
    """Return clean molecules with noise added to signal level `at`, `[n]`."""
    largest = graphs.present.shape[1]
    noise = centred(draws.normal(largest, 3), graphs.present)
    width = at[:, None, None]
    x = width.sqrt() * graphs.x + (1 - width).sqrt() * noise
    keep = draws.uniform(largest) < at[:, None]
    atoms = torch.where(keep, graphs.atoms, drawn(prior.atoms, draws.uniform(largest)))
    kept = symmetric((draws.uniform(largest, largest) < width).long()).bool()
    bonds = symmetric(drawn(prior.bonds, draws.uniform(largest, largest)))
    bonds = torch.where(kept, graphs.bonds, bonds)
    return Graphs(x.float(), atoms * graphs.present, bonds * graphs.pairs, graphs.present)


def step(state: Graphs, out: Denoised, t: float, s: float, prior: Prior, draws: Draws) -> Graphs:
    """Return the state at s < t: all parts drawn, each given the state at t. s = 0 gives clean molecules."""
    if s <= 0:
        return plugged_in(state, out)
    at_t, at_s = signal(t), signal(s)
    alpha, largest = at_t / at_s, state.present.shape[1]
    to_clean = math.sqrt(at_s) * (1 - alpha) / (1 - at_t)
    to_now = math.sqrt(alpha) * (1 - at_s) / (1 - at_t)
    width = math.sqrt((1 - at_s) / (1 - at_t) * (1 - alpha))
    noise = centred(draws.normal(largest, 3), state.present)
    x = centred(to_clean * out.x + to_now * state.x + width * noise, state.present)
    of_atoms = posterior(out.atoms.softmax(-1), state.atoms, t, s, prior.atoms)
    of_bonds = posterior(out.bonds.softmax(-1), state.bonds, t, s, prior.bonds)
    atoms = drawn(of_atoms, draws.uniform(largest)) * state.present
    bonds = symmetric(drawn(of_bonds, draws.uniform(largest, largest))) * state.pairs
    return Graphs(x, atoms, bonds, state.present)


def plugged_in(state: Graphs, out: Denoised) -> Graphs:
    """Return the likeliest clean molecules that a network sees in a state."""
    atoms = out.atoms.argmax(-1) * state.present
    return Graphs(out.x, atoms, symmetric(out.bonds.argmax(-1)) * state.pairs, state.present)
