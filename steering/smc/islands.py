"""Several populations per prompt: apart from each other, or selected among each other (a second level).

The k particles of a prompt are G consecutive populations of M = k / G, each with its own filter, its own
random stream and a running log weight

    lw_g = log_z_g + log mean exp(weights carried in g)

With G populations that never meet, the pictures of different populations share no ancestor. On a second level
whole populations are resampled by lw_g: with one survivor in each population that is SVDD with its weights
below and Feynman-Kac above. The normaliser of a prompt is unbiased either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffplug.steering.smc.filter import ParticleFilter, Selection, check_threshold, count_distinct
from diffplug.steering.smc.resampling import resample, settle
from diffplug.steering.smc.weights import ess, log_mean_exp


class Populations:
    """G populations for each of P prompts; the same interface as `ParticleFilter` with k = G * M particles.

    inner: filter of P * G groups of M particles. groups: P. generators: for the second level, one for each
    prompt. ess_threshold: resample populations where their effective number is below this share of G; None =
    they never meet. Raises ValueError where G is not whole, and for a second level over a biased inner rule.
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
            raise ValueError(f"{inner.groups} populations cannot be split among {groups} prompts")
        if ess_threshold is not None and not inner.exact:
            raise ValueError("populations that select greedily have no weights to be selected by")
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

    def select(self, rewards: Tensor, *, call: int, progress: float) -> Selection:
        """Return the selection of all levels; `resampled` says whether any level of the prompt selected."""
        before = self.inner.log_z.clone()
        below = self.inner.select(rewards.reshape(self.inner.groups, self.size), call=call, progress=progress)
        source, moved = self._second_level()
        ancestors = self._joined(below.ancestors, source)
        self.roots = self.roots.gather(-1, ancestors)
        logw = self._prompts(below.log_weights + before[:, None])
        selection = Selection(
            call=call,
            rewards=self._prompts(below.rewards),
            log_weights=logw,
            ess=ess(logw),
            resampled=below.resampled.reshape(self.groups, self.count).any(-1) | moved,
            ancestors=ancestors,
            distinct_roots=count_distinct(self.roots),
            invalid=below.invalid,
        )
        self.selections.append(selection)
        return selection

    def _second_level(self) -> tuple[Tensor, Tensor]:
        """Resample populations where that is due; return their sources `[P, G]` and which prompts did."""
        stay = torch.arange(self.count).expand(self.groups, -1)
        if self.ess_threshold is None or self.count == 1:
            return stay, torch.zeros(self.groups, dtype=torch.bool)
        logw = (self.inner.log_z + log_mean_exp(self.inner.psi - self.inner.base)).reshape(stay.shape)
        due = (logw.amax(-1) > logw.amin(-1)) & (ess(logw) < self.ess_threshold * self.count)
        source = torch.where(due[:, None], settle(resample(logw, self.generators)), stay)
        self.log_z = torch.where(due, self.log_z + log_mean_exp(logw), self.log_z)
        taken = torch.where(due[:, None], logw, 0.0).gather(-1, source).reshape(-1)
        self.inner.move_groups((source + self._offset(self.count)).reshape(-1))
        self.inner.log_z = self.inner.log_z - taken
        return source, due

    def _joined(self, below: Tensor, source: Tensor) -> Tensor:
        """Return ancestors `[P, k]` of "select within populations, then among them"."""
        within = below.reshape(self.groups, self.count, self.size)
        picked = within.gather(1, source[:, :, None].expand_as(within))
        return (picked + source[:, :, None] * self.size).reshape(self.groups, self.particles)

    def twisted(self, log_ratio: Tensor) -> None:
        """Add log p/tau `[P * k]`; see `ParticleFilter.twisted`."""
        self.inner.twisted(log_ratio)

    def finish(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights `[P, k]`, log normalisers `[P]` and checked rewards `[P, k]` of the end."""
        running = self.inner.log_z.clone()
        logw, _, scores = self.inner.finish(rewards.reshape(self.inner.groups, self.size))
        if not self.exact:
            return self._prompts(logw), torch.full_like(self.log_z, torch.nan), self._prompts(scores)
        logw = self._prompts(logw + running[:, None])
        return logw, self.log_z + log_mean_exp(logw), self._prompts(scores)

    def _prompts(self, values: Tensor) -> Tensor:
        return values.reshape(self.groups, self.particles)

    def _offset(self, step: int) -> Tensor:
        return torch.arange(self.groups)[:, None] * step
