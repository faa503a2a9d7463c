"""The comparison that must fail: the ordinary diffusion loss on preferred pictures."""

from __future__ import annotations

import torch

from diffplug.training.objective import Loss, Rows
from diffplug.training.objectives.preference.pso import PSO
from diffplug.training.preference.online import Drawn


class Naive(PSO):
    """eps-MSE on the winners, noised to the student's own timesteps."""

    rows: Rows

    def loss(self, rows: Rows) -> Loss:
        """Return the loss, the rows kept for their noise."""
        self.rows = rows
        return super().loss(rows)

    def compared(self, drawn: Drawn) -> Loss:
        """Return the error of eps at one of the student's timesteps, on the winner of each pair."""
        pairs, n, k = self.selected(drawn), *drawn.scores.shape
        if not len(pairs):
            return Loss(torch.zeros(n), torch.zeros(n))
        which = pairs.row * k + pairs.winner
        index = self.kernel.index[torch.arange(len(pairs)) % len(self.kernel)]
        noise = self.rows.normal(*self.network.form.shape)[pairs.row]
        path = self.network.path
        x = path.noised(drawn.paths.final[which], noise, torch.zeros_like(index), index)
        said = self.network(x, index, drawn.conditions[which])
        errors = (said.eps - noise).square().flatten(1).mean(1)
        weights = errors.new_zeros(n).index_fill(0, pairs.row, 1.0)
        return Loss(errors.new_zeros(n).index_add(0, pairs.row, errors), weights)
