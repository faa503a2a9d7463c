"""Which weights forget least: a small network that knows eight Gaussians learns two others.

The set-up of docs/tuning.md: an MLP of three hidden layers of 160, noise prediction, a label for the domain.
Old: 8 Gaussians on a ring of radius 2. New: two at (+-3, 3). All of deviation .1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffplug.training import SaRA, probe_threshold

CHOICES = ("magnitude", "random", "largest", "all")
BAR = 0.75


@dataclass(frozen=True)
class Forgot:
    """Losses on 8192 fixed samples of both domains after fine-tuning on the new one."""

    choice: str
    lr: float
    seed: int
    old: float
    new: float


class Net(nn.Module):
    """The noise in a 2-D point; inputs are the point, sines and cosines of its time, and a label."""

    def __init__(self) -> None:
        super().__init__()
        widths = (36, 160, 160, 160)
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(160, 2))
        self.frequencies = torch.linspace(0, 4, 16).exp()

    def forward(self, x: Tensor, t: Tensor, label: int) -> Tensor:
        angles = t[:, None] * self.frequencies
        told = torch.zeros(len(x), 2)
        told[:, label] = 1
        out: Tensor = self.layers(torch.cat([x, angles.sin(), angles.cos(), told], 1))
        return out


def points(label: int, count: int, generator: torch.Generator) -> Tensor:
    """Return samples of a domain, [n, 2]."""
    if label == 0:
        angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
        centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    else:
        side = torch.randint(2, (count,), generator=generator) * 6.0 - 3.0
        centre = torch.stack([side, torch.full((count,), 3.0)], 1)
    return centre + 0.1 * torch.randn(count, 2, generator=generator)


def loss(net: Net, label: int, count: int, generator: torch.Generator) -> Tensor:
    """Return the error of the noise at uniform times."""
    x0 = points(label, count, generator)
    t, eps = torch.rand(count, generator=generator), torch.randn(count, 2, generator=generator)
    x = (math.pi / 2 * t).cos()[:, None] * x0 + (math.pi / 2 * t).sin()[:, None] * eps
    return (net(x, t, label) - eps).square().sum(1).mean() / 2


def fixed(net: Net, label: int) -> float:
    """Return the loss on 8192 fixed samples."""
    with torch.no_grad():
        return float(loss(net, label, 8192, torch.Generator().manual_seed(99)))


def pretrained(seed: int) -> Net:
    """Return the network that knows the old domain: 1500 steps of 256, AdamW, 2e-3 to 1e-5."""
    torch.manual_seed(seed)
    net, generator = Net(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 2e-3 + (1e-5 - 2e-3) * step / 1500
        loss(net, 0, 256, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def tuned(base: Net, choice: str, lr: float, seed: int, steps: int = 400) -> Forgot:
    """Return what 400 steps on the new domain leave of the old one."""
    net = Net()
    net.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(1000 + seed)
    if choice == "all":
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    else:
        tuner = SaRA(net, density=0.06, score=choice, seed=seed)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=lr, weight_decay=0.01)
        tuner.attach(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss(net, 1, 256, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return Forgot(choice, lr, seed, fixed(net, 0), fixed(net, 1))


def table(seeds: int = 2, rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)) -> list[Forgot]:
    """Return what every choice forgets."""
    rows = []
    for seed in range(seeds):
        base = pretrained(seed)
        rows += [tuned(base, choice, lr, seed) for lr in rates for choice in CHOICES]
    return rows


def probed(seed: int = 0) -> float:
    """Return by how much zeroing the smallest 6 % changes the old loss, relatively."""
    net = pretrained(seed)
    return probe_threshold(net, lambda: fixed(net, 0), densities=(0.06,))[0].change
