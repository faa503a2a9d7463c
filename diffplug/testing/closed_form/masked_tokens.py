"""A masked token model small enough to enumerate: four places, three tokens and a mask, 256 states."""

from __future__ import annotations

import itertools
import math
from functools import cached_property

import torch
from torch import Tensor

LENGTH, TOKENS, MASK, STEPS = 4, 3, 3, 6
STRENGTH = 2.0
Z, TARGET_MEAN, BASE_MEAN = 25.56881, 3.02395, 0.48512


class MaskedModel:
    """The joint law exp(sum a[x_l] + sum 1[x_l = x_l+1]), a = (0, .5, 1), unmasked in six steps.

    Step i unmasks every masked place with chance 1 / (6 - i) and draws its token from the exact marginal
    given the visible tokens, places independently. The reward is the number of zeros.
    """

    @cached_property
    def states(self) -> Tensor:
        """Return all states, `[256, 4]` int64, in the order of their number."""
        return torch.tensor(list(itertools.product(range(TOKENS + 1), repeat=LENGTH)))

    def number(self, x: Tensor) -> Tensor:
        """Return the numbers of states `[..., 4]`."""
        return (x * (TOKENS + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)

    @cached_property
    def marginals(self) -> Tensor:
        """Return token probabilities `[256, 4, 3]` given the visible tokens."""
        whole = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
        logp = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[whole].sum(-1)
        p = (logp + (whole[:, 1:] == whole[:, :-1]).sum(-1)).exp()
        fits = ((self.states[:, None] == whole) | (self.states[:, None] == MASK)).all(-1) * p
        hot = torch.nn.functional.one_hot(whole, TOKENS).to(p)
        table = torch.einsum("sw,wlt->slt", fits, hot)
        return table / table.sum(-1, keepdim=True)

    def reward(self, x: Tensor) -> Tensor:
        """Return the number of zeros, float64."""
        return (x == 0).sum(-1).double()

    @cached_property
    def log_mean_exp_value(self) -> Tensor:
        """Return log E exp(strength r) / strength under independent marginals, `[256]`."""
        p0, masked = self.marginals[..., 0], self.states == MASK
        gain = torch.where(masked, (p0 * math.exp(STRENGTH) + 1 - p0).log(), 0.0).sum(-1)
        return self.reward(self.states) + gain / STRENGTH

    @cached_property
    def mean_value(self) -> Tensor:
        """Return the expected reward of each state under its marginals, `[256]`."""
        return self.reward(self.states) + (self.marginals[..., 0] * (self.states == MASK)).sum(-1)

    def kernel(self, step: int) -> Tensor:
        """Return the transition matrix `[256, 256]` of a step."""
        chance = 1.0 / (STEPS - step)
        masked = self.states == MASK
        stay = torch.where(masked, 1 - chance, 1.0)
        matrix = torch.ones(256, 256, dtype=torch.float64)
        for place in range(LENGTH):
            here, there = self.states[:, None, place], self.states[None, :, place]
            token = self.marginals[:, place][:, self.states[:, place].clamp(max=TOKENS - 1)]
            drawn = torch.where((here == MASK) & (there != MASK), chance * token, 0.0)
            matrix *= torch.where(here == there, stay[:, None, place], drawn)
        return matrix

    @cached_property
    def soft_values(self) -> list[Tensor]:
        """Return log E[exp(strength r)] / strength of all states, `[256]` before each step and at the end."""
        ahead = [(STRENGTH * self.reward(self.states)).exp()]
        for step in reversed(range(STEPS)):
            ahead.insert(0, self.kernel(step) @ ahead[0])
        return [value.log() / STRENGTH for value in ahead]

    def step(self, x: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Return the next states of `[n, 4]`."""
        u = torch.rand(*x.shape, dtype=torch.float64, generator=generator)
        cumulative = self.marginals[self.number(x)].cumsum(-1)
        draw = torch.rand(*x.shape, 1, dtype=torch.float64, generator=generator)
        token = (cumulative < draw).sum(-1).clamp(max=TOKENS - 1)
        return torch.where((x == MASK) & (u < 1.0 / (STEPS - step)), token, x)
