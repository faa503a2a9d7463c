"""Islands: several populations per prompt, apart from each other or selected among each other.

The k particles of a prompt are G consecutive islands of M = k / G, each with its own filter, its own random
stream and a running log weight

    lw_g = log_z_g + log mean exp(weights carried in g)

With G islands that never meet, the pictures of different islands share no ancestor. On a second level whole
islands are resampled by lw_g: with one survivor in each island that is SVDD with its weights below and
Feynman-Kac above. The normaliser of a prompt is unbiased either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffplug.steering.smc.filter import ParticleFilter, Selection, check_threshold, count_distinct
from diffplug.steering.smc.resampling import resample, settle
from diffplug.steering.smc.weights import ess, log_mean_exp


class Islands:
    """G islands for each of P prompts; the same interface as `ParticleFilter` with k = G * M particles.

    inner: filter of P * G groups of M particles. groups: P. generators: for the second level, one for each
    prompt. ess_threshold: resample islands where their effective number is below this share of G; None keeps
    them apart. Raises ValueError where G is not whole, and for a second level over a biased inner rule.
    """

    def __init__(
        self,
        inner: ParticleFilter,
        *,
        groups: int,
        generators: Sequence[torch.Generator],
        ess_threshold: float | None = None,
    ) -> None:
        check_threshold(ess_threshold)
        if inner.groups % groups:
            raise ValueError(f"{inner.groups} islands cannot be split among {groups} prompts")
        if ess_threshold is not None and not inner.exact:
            raise ValueError("islands that select greedily have no weights to be selected by")
        self.inner = inner
        self.groups = groups
        self.count, self.size = inner.groups // groups, inner.particles
        self.particles = self.count * self.size
        self.generators = generators
        self.ess_threshold = ess_threshold
        self.exact = inner.exact
        self.selections: list[Selection] = []
        self.log_z = torch.zeros(groups, dtype=torch.float64)
        self.roots = torch.arange(self.particles).expand(groups, -1)

    @property
    def apart(self) -> int:
        """Return how many islands of a prompt never meet, so that each has a best of its own."""
        return self.count if self.ess_threshold is None else 1

    def select(self, rewards: Tensor, *, call: int, progress: float) -> Selection:
        """Return the selection of all levels; `resampled` says whether any level of the prompt selected."""
        before = self.inner.log_z.clone()
        below = self.inner.select(rewards.reshape(self.inner.groups, self.size), call=call, progress=progress)
        resampled = below.resampled.reshape(self.groups, self.count).any(-1)
        ancestors = below.ancestors.reshape(self.groups, self.count, self.size)
        source = torch.arange(self.count)[:, None]
        if self.ess_threshold is not None and self.count > 1:
            source, moved = self._second_level()
            ancestors = ancestors.gather(1, source.expand_as(ancestors))
            resampled = resampled | moved
        ancestors = (ancestors + source * self.size).reshape(self.groups, self.particles)
        self.roots = self.roots.gather(-1, ancestors)
        logw = (below.log_weights + before[:, None]).reshape(self.groups, self.particles)
        selection = Selection(
            call=call,
            rewards=below.rewards.reshape(self.groups, self.particles),
            log_weights=logw,
            ess=ess(logw),
            resampled=resampled,
            ancestors=ancestors,
            distinct_roots=count_distinct(self.roots),
            invalid=below.invalid,
        )
        self.selections.append(selection)
        return selection

    def _second_level(self) -> tuple[Tensor, Tensor]:
        """Resample islands where that is due; return their sources `[P, G, 1]` and which prompts did so."""
        stay = torch.arange(self.count).expand(self.groups, -1)
        logw = (self.inner.log_z + log_mean_exp(self.inner.psi - self.inner.base)).reshape(stay.shape)
        due = (logw.amax(-1) > logw.amin(-1)) & (ess(logw) < (self.ess_threshold or 1.0) * self.count)
        source = torch.where(due[:, None], settle(resample(logw, self.generators)), stay)
        self.log_z = torch.where(due, self.log_z + log_mean_exp(logw), self.log_z)
        taken = torch.where(due[:, None], logw, 0.0).gather(-1, source).reshape(-1)
        first = torch.arange(self.groups)[:, None] * self.count
        self.inner.move_groups((source + first).reshape(-1))
        self.inner.log_z = self.inner.log_z - taken
        return source[:, :, None], due

    def twisted(self, log_ratio: Tensor) -> None:
        """Add log p/tau `[P * k]`; see `ParticleFilter.twisted`."""
        self.inner.twisted(log_ratio)

    def finish(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights `[P, k]`, log normalisers `[P]` and checked rewards `[P, k]` of the end."""
        running = self.inner.log_z.clone()
        logw, _, scores = self.inner.finish(rewards.reshape(self.inner.groups, self.size))
        shape = self.groups, self.particles
        if not self.exact:
            return logw.reshape(shape), torch.full_like(self.log_z, torch.nan), scores.reshape(shape)
        logw = (logw + running[:, None]).reshape(shape)
        return logw, self.log_z + log_mean_exp(logw), scores.reshape(shape)
