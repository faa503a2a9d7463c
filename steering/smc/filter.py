"""The particle filter: bookkeeping of log weights, selections and the normaliser, without a scheduler or a
network.

Cumulative form of a Feynman-Kac filter (arXiv 2501.06848, algorithm 1) with weights that are carried where
nothing is resampled. For every group of k particles:

    psi   cumulative log potential of the lineage        w = psi - base   log weight
    base  psi at the last selection of the lineage       log_z += log mean exp(w) at every selection

After the last call w = strength * reward - base, so intermediate potentials leave their mark through `base`
alone and exp(log_z) is an unbiased estimate of E[exp(strength * reward)] for every k, potential, resampler
and threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.checks import check_number
from diffplug.steering.smc.potentials import Potential
from diffplug.steering.smc.resampling import Selector, selector, settle
from diffplug.steering.smc.weights import ess, log_mean_exp


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What a scored call decided: `[groups, k]` rewards (-inf = dead), log weights before the selection, and
    ancestors; `[groups]` the rest.
    """

    call: int
    rewards: Tensor
    log_weights: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    distinct_roots: Tensor
    invalid: int

    @property
    def moves(self) -> bool:
        """Return whether any particle was replaced."""
        return bool((self.ancestors != torch.arange(self.ancestors.shape[-1])).any())


def checked_rewards(rewards: Tensor) -> tuple[Tensor, int]:
    """Return float64 rewards with NaN and +inf as -inf (dead), and how many of those there were."""
    rewards = rewards.detach().to("cpu", torch.float64)
    invalid = torch.isnan(rewards) | (rewards == torch.inf)
    return torch.where(invalid, -torch.inf, rewards), int(invalid.sum())


def check_threshold(ess_threshold: float | None) -> None:
    """Raise ValueError unless the threshold is None or in (0, 1]."""
    if ess_threshold is not None:
        check_number("ess_threshold", ess_threshold)
    if ess_threshold is not None and not 0 < ess_threshold <= 1:
        raise ValueError(
            f"ess_threshold={ess_threshold}: give a share of the particles in (0, 1], or None to "
            "resample at every scored call"
        )


class ParticleFilter:
    """P independent groups of k weighted particles; `select` at scored calls, `finish` at the end.

    groups, particles: P and k. potential: see `diffplug.steering.smc.potentials`. resampler: a name of
    `RESAMPLERS`, or a selector such as `one_survivor`; one that is marked `biased` leaves no weights (`exact`
    is False, the final weights are equal and the normaliser is NaN). ess_threshold: select where the
    effective sample size is below this share of k; None selects at every scored call. generators: CPU
    generators for the selections, one for all groups or one for each. Groups never mix. A group whose weights
    are equal stays as it is; one in which a particle died selects at once; one in which all died counts as
    not scored.
    """

    def __init__(
        self,
        *,
        groups: int,
        particles: int,
        potential: Potential,
        generators: Sequence[torch.Generator],
        resampler: str | Selector = "systematic",
        ess_threshold: float | None = None,
    ) -> None:
        check_threshold(ess_threshold)
        self.groups, self.particles = groups, particles
        self.potential = potential
        self.selector = selector(resampler) if isinstance(resampler, str) else resampler
        self.exact = not getattr(resampler, "biased", False)
        self.ess_threshold = ess_threshold
        self.generators = generators
        self.selections: list[Selection] = []
        self.psi = torch.zeros(groups, particles, dtype=torch.float64)
        self.base = torch.zeros_like(self.psi)
        self.twist = torch.zeros_like(self.psi)
        self.log_z = torch.zeros(groups, dtype=torch.float64)
        self.share = torch.zeros_like(self.log_z)
        self.roots = torch.arange(particles).expand(groups, particles)
        self._path = torch.empty(0, groups, particles, dtype=torch.float64)

    def select(self, rewards: Tensor, *, call: int, progress: float) -> Selection:
        """Return the selection for the rewards `[P * k]` or `[P, k]` of a call; costs one draw per group and
        particle.

        progress: share of the run done, in (0, 1]; a rising potential needs it.
        """
        scores, invalid = checked_rewards(rewards.reshape(self.groups, self.particles))
        alive = torch.isfinite(scores).any(-1, keepdim=True)
        self._weigh(scores, alive, progress)
        logw = self.psi - self.base
        size = ess(logw)
        due = logw.amax(-1) > logw.amin(-1)  # equal weights stay as they are
        if self.ess_threshold is not None:
            due &= (size < self.ess_threshold * self.particles) | (logw == -torch.inf).any(-1)
        chosen = due & alive[:, 0]
        drawn = settle(self.selector(logw, self.generators))
        ancestors = torch.where(chosen[:, None], drawn, torch.arange(self.particles))
        self._inherit(ancestors, chosen, logw)
        selection = Selection(
            call=call,
            rewards=scores,
            log_weights=logw,
            ess=size,
            resampled=chosen,
            ancestors=ancestors,
            distinct_roots=count_distinct(self.roots),
            invalid=invalid,
        )
        self.selections.append(selection)
        return selection

    def _weigh(self, scores: Tensor, alive: Tensor, progress: float) -> None:
        """Bring the log potentials up to date; those of a group without a live particle stay."""
        self._path = torch.cat([self._path, torch.where(alive, scores, torch.nan)[None]])
        full = torch.where(alive, self.potential.full(self._path), -torch.inf)
        self.share = self.potential.share(full, self.base - self.twist, self.share, progress)
        share = self.share[:, None]
        tilted = torch.where(full == -torch.inf, -torch.inf, share * full) + self.twist
        self.psi = torch.where(alive, tilted, self.psi)

    def twisted(self, log_ratio: Tensor) -> None:
        """Add log p/tau, `[P * k]` or `[P, k]`, of a proposal tau that was used in place of the transition p.

        The next weights, the final ones among them, then make up for it.
        """
        self.twist = self.twist + log_ratio.to("cpu", torch.float64).reshape(self.groups, self.particles)

    def move_groups(self, source: Tensor) -> None:
        """Make group g continue from group source[g], `[groups]` int64: a level above selects groups."""
        for name in ("psi", "base", "twist", "log_z", "share", "roots"):
            setattr(self, name, getattr(self, name).index_select(0, source))
        self._path = self._path.index_select(1, source)

    def _inherit(self, ancestors: Tensor, chosen: Tensor, logw: Tensor) -> None:
        """Move lineages to their ancestors and close the books of the groups that selected."""
        self.log_z = torch.where(chosen, self.log_z + log_mean_exp(logw), self.log_z)
        self.psi = self.psi.gather(-1, ancestors)
        self.twist = self.twist.gather(-1, ancestors)
        self.roots = self.roots.gather(-1, ancestors)
        self._path = self._path.gather(-1, ancestors.expand_as(self._path))
        self.base = torch.where(chosen[:, None], self.psi, self.base)

    def finish(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights `[P, k]`, log normalisers `[P]` and checked rewards `[P, k]` of the end."""
        scores, _ = checked_rewards(rewards.reshape(self.groups, self.particles))
        if not self.exact:
            equal = torch.where(scores == -torch.inf, scores, 0.0)
            return equal, torch.full_like(self.log_z, torch.nan), scores
        logw = self.potential.final(scores) + self.twist - self.base
        return logw, self.log_z + log_mean_exp(logw), scores


def count_distinct(index: Tensor) -> Tensor:
    """Return how many different values each row of `[groups, k]` indices in 0..k-1 has, `[groups]` int64."""
    return torch.zeros_like(index).scatter(-1, index, 1).sum(-1)
