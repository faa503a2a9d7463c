"""Sixteen Gaussians on a grid; a prompt names a column, a row, both or neither. All answers in closed form.

What a prompt leaves open, a negative prompt decides: "column 2, not row 1" has three places left of four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffplug.training.noise_path import NoisePath

SIDE, SPACING, SPREAD = 4, 0.7, 0.2
LOW, HIGH, RANGE = 2.0, 3.0, (1.0, 5.0)
"""Guidance scales: two that are measured, and the range of training. They are small, because guidance throws
samples out of a grid whose points lie far apart."""
OPEN = SIDE
"""The word of a prompt that leaves column or row open."""
Output = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """Where the points are: scaled, turned (radians), moved. The base model is trained on `World()`."""

    scale: float = 1.0
    turn: float = 0.0
    shift: float = 0.0

    @property
    def centres(self) -> Tensor:
        """The means [16, 2]; number 4 row + column."""
        line = SPACING * (torch.arange(SIDE) - (SIDE - 1) / 2)
        row, column = torch.meshgrid(line, line, indexing="ij")
        flat = self.scale * torch.stack([column.flatten(), row.flatten()], 1)
        angle = torch.tensor(self.turn)
        matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        return flat @ matrix.T + self.shift


def path_of(prediction: str = "epsilon") -> NoisePath:
    """The linear schedule of 1000 steps."""
    return NoisePath.of(DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction))


def allowed(prompts: Tensor) -> Tensor:
    """Return which points prompts [n, 2] (column, row; OPEN for any) name, [n, 16]."""
    number = torch.arange(SIDE * SIDE)
    own = torch.stack([number % SIDE, number // SIDE], 1)
    fits = (prompts[:, None] == own) | (prompts[:, None] == OPEN)
    return fits.all(-1)


def sampled(prompts: Tensor, which: Tensor, noise: Tensor, world: World) -> Tensor:
    """Return data [n, 2]: point number floor(which x choices) of those that each prompt names."""
    there = allowed(prompts)
    order = there.cumsum(1) - 1
    wanted = (which * there.sum(1)).long()[:, None]
    number = (there & (order == wanted)).long().argmax(1)
    return world.centres[number] + SPREAD * noise


def exact(x: Tensor, index: Tensor, prompts: Tensor, path: NoisePath, world: World | None = None) -> Tensor:
    """Return the exact output of the path's kind at states x [n, 2] of indices [n], for prompts [n, 2]."""
    alpha, sigma = (v.to(x).view(-1, 1) for v in path.levels(index))
    centres = (world or World()).centres.to(x)
    variance = (alpha * SPREAD) ** 2 + sigma**2
    gap = x[:, None] - alpha[:, None] * centres
    logits = -(gap.square().sum(-1) / (2 * variance)).masked_fill(~allowed(prompts), float("inf"))
    eps = sigma * (logits.softmax(1)[..., None] * gap).sum(1) / variance
    x0 = (x - sigma * eps) / alpha
    return {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "sample": x0,
        "flow_prediction": eps - x0,
    }[path.prediction]


def guided(positive: Tensor, negative: Tensor, w: Any) -> Tensor:
    """Return y(c-) + w (y(c+) - y(c-))."""
    return negative + w * (positive - negative)


def gap_of(said: Tensor, positive: Tensor, wanted: Tensor) -> float:
    """Return R = |said - wanted|^2 / |y(c+) - wanted|^2: 1 without guidance, 0 for guidance itself."""
    return float((said - wanted).square().sum() / (positive - wanted).square().sum())


@torch.no_grad()
def drawn(output: Output, x: Tensor, steps: int, path: NoisePath) -> Tensor:
    """Return the ends of DDIM runs of `steps` trailing steps from noise x [n, 2]."""
    grid = [round(path.train_steps * (1 - j / steps)) for j in range(steps + 1)]
    for here, there in pairwise(grid):
        index, after = (torch.full((len(x),), float(v), dtype=torch.float64) for v in (here, there))
        x = path.jump(path.predict(output(x, index), x, index), after)
    return x


def violations(ends: Tensor, negatives: Tensor, world: World | None = None) -> float:
    """Return the share of samples whose nearest point is in the row that negatives [n, 2] name."""
    nearest = torch.cdist(ends, (world or World()).centres.to(ends)).argmin(1)
    return float((nearest // SIDE == negatives[:, 1]).float().mean())


def cases(n: int, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts of a column alone, negatives of a row alone [n, 2], and start noise [n, 2]."""
    g = torch.Generator().manual_seed(seed)
    open_ = torch.full((n,), OPEN)
    column, row = (torch.randint(SIDE, (n,), generator=g) for _ in "cr")
    noise = torch.randn(n, 2, generator=g)
    return torch.stack([column, open_], 1), torch.stack([open_, row], 1), noise
