"""A predictor of ranks that reads a schedule step by step: an LSTM with a pairwise hinge loss."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from diffplug.samplers.search.decisions.evolution import PER_STEP
from diffplug.samplers.search.decisions.space import ScheduleSpace

__all__ = ["LSTMRanks"]

Floats = npt.NDArray[np.float64]
WAVES = 128


class LSTMRanks:
    """Learns the order of scores from the steps of schedules (the predictor of arXiv 2306.08860, 2312.07243).

    Each step is its decisions and a sinusoidal embedding of where it begins and ends in lambda; an LSTM reads
    them, the mean of its normalised outputs goes through a small network to one number. The loss asks of each
    pair of schedules that the worse one's number is larger by one. Takes seconds for a few hundred schedules.

    Args:
        epochs: passes over all schedules, at most 512 pairs for each of them. least: pairs whose ranks are
        nearer than this share of all are left out, as their order says little.
    """

    def __init__(
        self,
        space: ScheduleSpace,
        *,
        seed: int = 0,
        epochs: int = 60,
        rate: float = 3e-3,
        least: float = 0.02,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs={epochs}: give at least 1")
        self.slots, self.seed, self.epochs, self.rate, self.least = space.slots, seed, epochs, rate, least

    def fit(self, rows: Floats, scores: Floats) -> None:
        """Forget what was learned before, and learn from all rows."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            self.network = _Network(self.slots)
            ranks = torch.from_numpy(np.argsort(np.argsort(scores)) / len(scores)).float()
            inputs = torch.from_numpy(rows).float()
            optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
            for _ in range(self.epochs):
                optimizer.zero_grad()
                hinge(self.network(inputs), ranks, self.least).backward()
                optimizer.step()

    def predict(self, rows: Floats) -> Floats:
        """A number for each row, the smaller the better the score it expects."""
        with torch.no_grad():
            return self.network(torch.from_numpy(rows).float()).double().numpy()


def hinge(found: Tensor, ranks: Tensor, least: float = 0.0) -> Tensor:
    """Mean of max(0, 1 - (s_i - s_j)) over pairs with rank_i > rank_j + least; s are the numbers found."""
    apart = ranks[:, None] - ranks[None, :] > least
    wrong = relu(1 - (found[:, None] - found[None, :]))
    return (wrong * apart).sum() / apart.sum().clamp(min=1)


class _Network(nn.Module):
    """Rows of `s3.features` [n, d] to numbers [n]."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.place = nn.Sequential(nn.Linear(2 * WAVES, 64), nn.SiLU())
        self.decisions = nn.Sequential(nn.Linear(PER_STEP + 1, 64), nn.SiLU(), nn.Linear(64, 64))
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        widths = [128, 200, 200, 200]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.head = nn.Sequential(*layers, nn.Linear(200, 1))

    def forward(self, rows: Tensor) -> Tensor:
        lams, (count, first), rest = self._split(rows)
        ends = torch.stack([lams[:, :-1], lams[:, 1:]], dim=2)
        decisions = torch.cat(
            [rest.unflatten(1, (-1, PER_STEP)), first[:, None].expand(-1, self.slots, 1)], 2
        )
        steps = torch.cat([self.place(_waves(ends)), self.decisions(decisions)], dim=2)
        read = normalize(self.lstm(steps)[0], dim=2)
        real = (torch.arange(self.slots) < count)[..., None]
        return self.head(normalize((read * real).sum(1), dim=1))[:, 0]

    def _split(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The nodes [n, slots + 1], the count of steps and how they begin [n, 1], and the decisions."""
        lams, count, first, rest = rows.split([self.slots + 1, 1, 1, PER_STEP * self.slots], dim=1)
        return lams, (count, first), rest


def _waves(places: Tensor) -> Tensor:
    """[n, steps, 2 WAVES] of lambdas [n, steps, 2]: sines and cosines of 64 wavelengths from 0.1 to 100."""
    rates = 2 * math.pi * torch.logspace(1, -2, WAVES // 2)
    angles = (places[..., None] * rates).flatten(2)
    return torch.cat([angles.sin(), angles.cos()], dim=2)
