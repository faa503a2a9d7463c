"""Resampling: pure functions from log weights and uniform numbers to ancestor indices.

Every scheme gives particle i an expected n W_i offspring, which is all that an unbiased particle filter
needs; they differ in the variance they add (Douc, Cappe, Moulines 2005, arXiv cs/0507025). Shapes: `logw:
[groups, k]` float64, `u: [groups, n]` uniform on [0, 1), result `[groups, n]` int64 with entries in 0..k-1. A
particle of weight zero never has offspring, whatever the rounding and whatever `u`.

Other selections have the same form. `one_survivor` gives every particle k W_i expected offspring, so it is an
(extreme) resampling scheme and the normaliser of a filter that uses it is unbiased: that filter is SVDD with
its importance weights (arXiv 2408.08252). `the_best` and `beam` are marked `biased`: they maximise, and no
weights belong to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffplug.steering.smc.weights import as_log_weights, normalised

_BELOW_ONE = 1.0 - 2.0**-53


def _look_up(weights: Tensor, points: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds each point of [0, 1); never a zero weight."""
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    return torch.searchsorted(cumulative, points.clamp(max=_BELOW_ONE).contiguous(), right=True)


def multinomial(logw: Tensor, u: Tensor) -> Tensor:
    """Return n independent draws. The noisiest scheme: it loses particles even when all weights are equal."""
    return _look_up(normalised(logw), u)


def stratified(logw: Tensor, u: Tensor) -> Tensor:
    """Return one draw from each of n equal strata of [0, 1)."""
    n = u.shape[-1]
    return _look_up(normalised(logw), (torch.arange(n, dtype=torch.float64) + u) / n)


def systematic(logw: Tensor, u: Tensor) -> Tensor:
    """Return draws at n equal spacings with one offset u[:, 0]: floor or ceil of n W_i offspring each."""
    n = u.shape[-1]
    return _look_up(normalised(logw), (torch.arange(n, dtype=torch.float64) + u[..., :1]) / n)


def residual(logw: Tensor, u: Tensor) -> Tensor:
    """Return floor(n W_i) certain copies of every particle i, and independent draws from the rest."""
    n, weights = u.shape[-1], normalised(logw)
    copies = (n * weights).floor()
    left = n - copies.sum(-1, keepdim=True)
    rest = n * weights - copies
    rest = torch.where(left > 0, rest, weights)
    draws = _look_up(rest, u)
    taken = (torch.arange(n) < left).to(torch.float64)
    return _listed(copies.scatter_add(-1, draws, taken).long())


def ssp(logw: Tensor, u: Tensor, n: int | None = None) -> Tensor:
    """Return floor or ceil of n W_i copies of every particle i, by the Srinivasan sampling process.

    Like systematic resampling, but consistent whatever the order of the particles (Gerber, Chopin, Whiteley
    2019, arXiv 1708.04220). The fractions of two particles at a time are merged until one of them is whole.
    u: `[groups, >= k - 1]`, one number for each merge. n: number of offspring, by default u's last axis.
    """
    weights = normalised(logw)
    k, n = weights.shape[-1], u.shape[-1] if n is None else n
    copies = (n * weights).floor()
    fractions = n * weights - copies
    groups = torch.arange(len(weights))
    holder, p = torch.zeros_like(groups), fractions[:, 0]
    for j in range(1, k):
        q = fractions[:, j]
        whole = (p + q >= 1).to(p.dtype)  # one of the two becomes 1, else one of them becomes 0
        keep = torch.where(whole > 0, (1 - q) / (2 - p - q), p / (p + q).clamp(min=1e-300))
        stays = (u[:, j - 1] < keep) | (q == 0)
        winner = torch.where(stays, holder, torch.full_like(holder, j))
        loser = torch.where(stays, torch.full_like(holder, j), holder)
        copies[groups, winner] += whole
        holder, p = torch.where(whole > 0, loser, winner), p + q - whole
    copies[groups, holder] += n - copies.sum(-1)  # what is left is 0 or 1, but for rounding
    return _listed(copies.long())


def _listed(copies: Tensor) -> Tensor:
    """Return indices 0..k-1, each repeated as often as `copies [groups, k]` says: `[groups, n]`."""
    index = torch.arange(copies.shape[-1]).expand_as(copies)
    return torch.repeat_interleave(index.reshape(-1), copies.reshape(-1)).reshape(copies.shape[0], -1)


RESAMPLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "multinomial": multinomial,
}


def check_resampler(name: str) -> str:
    """Return `name` if it is a known scheme, else raise ValueError that lists them."""
    if name not in RESAMPLERS:
        raise ValueError(f"unknown resampler {name!r}: choose one of {', '.join(RESAMPLERS)}")
    return name


def uniforms(generators: Sequence[torch.Generator], groups: int, n: int) -> Tensor:
    """Return `[groups, n]` float64 uniform numbers: row g from generator g, or all rows from a single one."""
    if len(generators) == 1:
        return torch.rand(groups, n, dtype=torch.float64, generator=generators[0])
    if len(generators) != groups:
        raise ValueError(
            f"{len(generators)} generators for {groups} groups: give one for all, or one for each group"
        )
    return torch.stack([torch.rand(n, dtype=torch.float64, generator=g) for g in generators])


Selector = Callable[[Tensor, Sequence[torch.Generator]], Tensor]
"""From log weights `[groups, k]` and generators to ancestors `[groups, k]`."""


def selector(scheme: str, n: int | None = None) -> Selector:
    """Return the selection that a named scheme makes, of n (default k) ancestors for each group.

    Raises ValueError for an unknown scheme.
    """
    draw = RESAMPLERS[check_resampler(scheme)]

    def drawn(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        groups, k = logw.shape
        wanted = k if n is None else n
        if draw is ssp:  # as many numbers as there are particles to merge
            return ssp(logw, uniforms(generators, groups, max(wanted, k)), wanted)
        return draw(logw, uniforms(generators, groups, wanted))

    return drawn


def resample(
    logw: Tensor,
    generator: torch.Generator | Sequence[torch.Generator],
    scheme: str = "systematic",
    n: int | None = None,
) -> Tensor:
    """Return n (default k) ancestor indices per group, each particle i appearing n W_i times on average.

    logw: `[k]` or `[groups, k]` unnormalised log weights, NaN = dead. generator: on the CPU, one for all
    groups or one for each. scheme: one of `RESAMPLERS`. Result: `[n]` or `[groups, n]` int64. Raises
    ValueError for an unknown scheme, n < 1, +inf, or a group in which every particle is dead.
    """
    logw = as_log_weights(logw)
    rows = logw.reshape(-1, logw.shape[-1])
    n = rows.shape[-1] if n is None else n
    if n < 1:
        raise ValueError(f"n={n} offspring asked for: n must be at least 1")
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    return selector(scheme, n)(rows, generators).reshape(*logw.shape[:-1], n)


def settle(ancestors: Tensor) -> Tensor:
    """Return the same ancestors `[groups, k]`, reordered so that every survivor keeps its own slot.

    Only the slots of particles without offspring change hands: fewer rows move and previews stay where they
    were.
    """
    copies = torch.zeros_like(ancestors).scatter_add(-1, ancestors, torch.ones_like(ancestors))
    index = torch.arange(ancestors.shape[-1]).expand_as(ancestors)
    settled = index.clone()
    settled[copies == 0] = torch.repeat_interleave(index.reshape(-1), (copies - 1).clamp(min=0).reshape(-1))
    return settled


def one_survivor(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return k times one ancestor, drawn with probability W_i (softmax selection; arXiv 2408.08252)."""
    return resample(logw, generators, "multinomial", n=1).expand_as(logw)


def the_best(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return k times the ancestor of the largest weight, the lowest slot of equals (greedy selection)."""
    return as_log_weights(logw).argmax(-1, keepdim=True).expand_as(logw)


the_best.biased = True  # type: ignore[attr-defined]


def beam(width: int) -> Selector:
    """Return beam selection: each of the `width` best particles gets k / width copies.

    If fewer than `width` are alive, the best one fills the free places.
    """

    def keep(logw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        logw = as_log_weights(logw)
        order = torch.argsort(logw, dim=-1, descending=True, stable=True)[..., :width]
        alive = logw.gather(-1, order) > -torch.inf
        order = torch.where(alive, order, order[..., :1])
        return order.repeat_interleave(logw.shape[-1] // width, -1)

    keep.biased = True  # type: ignore[attr-defined]
    return keep


def kl_bound(candidates: int, selections: int) -> float:
    """Return the most nats by which greedy selection can move a law: selections * (log M - 1 + 1/M).

    By the chain rule each selection among M candidates adds at most the divergence of best-of-M.
    """
    m = torch.tensor(float(candidates), dtype=torch.float64)
    return selections * float(m.log() - 1 + 1 / m)
