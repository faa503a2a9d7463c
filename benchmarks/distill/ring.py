"""The toy: eight Gaussians on a circle, a small network, known distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath, edges
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.objectives.latents import Started
from diffplug.training.trainer import Trainer
from diffplug.training.tuners.full import FullTuner

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RADIUS, SPREAD, MODES, OFF = 1.4, 0.1, 8, 0.35
PATH = NoisePath.of(DDIMScheduler(**BETAS))
FORM = CallForm("x", "timestep", 1.0, 1.0, (2,), {"return_dict": False})
NONE = Conditions({})
SAMPLES = 4096


def centres() -> Tensor:
    """The eight means [8, 2]."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


class Ring(nn.Module):
    """A residual network of width 96 with three blocks and a sinusoidal time."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.start = nn.Linear(2, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(3)
        )
        self.end = nn.Linear(width, 2)
        self.register_buffer("rates", torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2)))

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        angle = timestep[:, None] * self.rates
        time = self.time(torch.cat([angle.cos(), angle.sin()], dim=1))
        h = self.start(x)
        for block in self.blocks:
            h = h + block(nn.functional.silu(h + time))
        return (self.end(h),)


@dataclass(frozen=True)
class FreshRing:
    """Samples of the ring, new ones for every row."""

    def clean(self, rows: Rows) -> Tensor:
        """Return data [n, 2]."""
        return centres()[rows.integers(0, MODES)] + SPREAD * rows.normal(2)

    def draw(self, rows: Rows, objective: Any) -> Started:
        """Return noised samples where a consistency step begins."""
        x0, eps = self.clean(rows), rows.normal(2)
        index, below = objective.start(rows)
        return Started(PATH.noised(x0, eps, torch.zeros_like(index), index), index, below, NONE)


class Denoising(Objective):
    """The teacher's training: the closed-form eps at uniform timesteps."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def groups(self) -> list[Group]:
        """The teacher."""
        return [Group("student", self.network.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the error of eps."""
        index = 1 + rows.integers(0, 1000)
        x = PATH.noised(FreshRing().clean(rows), rows.normal(2), torch.zeros_like(index), index)
        said = self.network(x, index, NONE)
        return Loss((said.eps - exact(x, index)).square().mean(1))


def exact(x: Tensor, index: Tensor) -> Tensor:
    """Return the exact eps of noised ring data at states x [n, 2]."""
    alpha, sigma = (v.to(x).view(-1, 1) for v in PATH.levels(index))
    variance = (alpha * SPREAD) ** 2 + sigma**2
    gap = x[:, None] - alpha[:, None] * centres()
    weight = (-gap.square().sum(-1) / (2 * variance)).softmax(1)
    return sigma * (weight[..., None] * gap).sum(1) / variance


def network(weights: dict[str, Tensor] | None = None, seed: int = 0) -> Network:
    """Return a network with these weights, all of them to be tuned."""
    torch.manual_seed(seed)
    denoiser, tuner = Ring(), FullTuner()
    if weights is not None:
        denoiser.load_state_dict(weights, strict=False)
    tuner.attach(denoiser)
    return Network(denoiser, PATH, FORM, tuner)


def fitted(
    objective: Objective,
    folder: Path,
    *,
    updates: int,
    lr: float,
    ema: float,
    seed: int = 0,
    batch: int = 256,
) -> dict[str, Tensor]:
    """Train an objective as the toy does, and return the averaged weights."""
    trainer = Trainer(
        objective,
        RunSettings(updates=updates, batch=batch, save_every=10_000, keep=1, seed=seed),
        OptimizerSettings(lr=lr, ema=ema, floor=0.0, warmup=0, clip=1e9, betas=(0.9, 0.999)),
        folder=folder,
        cpu=True,
    )
    return trainer.run().weights["student"]


def teacher(folder: Path) -> dict[str, Tensor]:
    """Return the teacher's weights, trained for 5,000 updates on the exact eps."""
    return fitted(Denoising(network()), folder, updates=5000, lr=2e-3, ema=0.99)


def noises(n: int = SAMPLES) -> Tensor:
    """Return the fixed start noises [n, 2]."""
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(123))


def data(n: int = SAMPLES, seed: int = 7) -> Tensor:
    """Return samples of the ring."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(MODES, (n,), generator=generator)
    return centres()[which] + SPREAD * torch.randn(n, 2, generator=generator)


@torch.no_grad()
def ddim(net: Network, n: int, x: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Return end points of n DDIM steps over equal segments from the fixed noises, with noise eta."""
    x = noises() if x is None else x
    generator = torch.Generator().manual_seed(5)
    edge = torch.tensor(edges(PATH, n)[::-1], dtype=torch.float64)
    for start, end in pairwise(edge):
        said = net(x, start.expand(len(x)), NONE)
        (a, s), (b, r) = PATH.levels(start[None]), PATH.levels(end[None])
        noise = eta * float(r / s * (1 - (a / b) ** 2).clamp(min=0).sqrt())
        x = float(b) * said.x0 + math.sqrt(max(float(r) ** 2 - noise**2, 0)) * said.eps
        x = x + noise * torch.randn(x.shape, generator=generator)
    return x


@torch.no_grad()
def solver(net: Network, name: str, n: int) -> Tensor:
    """Return end points of a stock multistep solver."""
    cls: Callable[..., Any] = {"DPM++2M": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}[name]
    scheduler = cls(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    x = noises()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, (t + 1).expand(len(x)), NONE).eps, t, x).prev_sample
    return x


def rmse(x: Tensor, end: Tensor) -> float:
    """Return the root of the mean squared distance per coordinate."""
    return float((x - end).square().mean().sqrt())


def sliced(x: Tensor, y: Tensor, directions: int = 128) -> float:
    """Return the sliced Wasserstein-2 distance of two samples of equal size."""
    angle = math.pi * torch.arange(directions) / directions
    along = torch.stack([angle.cos(), angle.sin()])
    gap = (x @ along).sort(0).values - (y @ along).sort(0).values
    return float(gap.square().mean().sqrt())


def modes(x: Tensor) -> tuple[float, float]:
    """Return the share of samples farther than .35 from every mode, and the smallest share of a mode."""
    distance, nearest = torch.cdist(x, centres()).min(1)
    shares = torch.bincount(nearest, minlength=MODES) / len(x)
    return float((distance > OFF).float().mean()), float(shares.min())
