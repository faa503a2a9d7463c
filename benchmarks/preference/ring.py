"""The ring: eight Gaussians, a distilled student of four steps, and what tuning does to its sharpness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.objectives.preference.pso import PSO, PSOSettings
from diffplug.training.objectives.preference.spo import SPO, SPOSettings
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.rollout import rollout
from diffplug.training.trainer import Trainer
from diffplug.training.tuners.full import FullTuner

RADIUS, SPREAD, MODES = 2.0, 0.08, 8
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FORM = CallForm("x", "timestep", 1.0, 1.0, (2,), {"return_dict": False}, ("none",))
PROMPTS = 128
NONE = Conditions({"none": torch.zeros(PROMPTS, 1)})


def path_of(prediction: str) -> NoisePath:
    """The schedule of Stable Diffusion."""
    return NoisePath.of(DDIMScheduler(**BETAS, prediction_type=prediction))


def centres() -> Tensor:
    """The eight means [8, 2]."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


class Net(nn.Module):
    """Three layers of 192, told the time by waves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(18, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(),
            nn.Linear(192, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, timestep: Tensor, none: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        rate = 2.0 ** torch.arange(8)
        angle = timestep[:, None] / 1000 * rate
        return (self.layers(torch.cat([x, angle.cos(), angle.sin()], dim=1)),)


def network(prediction: str, weights: dict[str, Tensor] | None = None) -> Network:
    """Return a network with these weights, all of them to be tuned, and itself as it was."""
    torch.manual_seed(0)
    denoiser, tuner = Net(), FullTuner()
    if weights is not None:
        denoiser.load_state_dict(weights)
    tuner.attach(denoiser)
    return Network(denoiser, path_of(prediction), FORM, tuner)


def exact(x: Tensor, index: Tensor, path: NoisePath) -> Tensor:
    """Return the exact x0hat of ring data noised to indices [n]."""
    alpha, sigma = (v.to(x).view(-1, 1) for v in path.levels(index))
    variance = (alpha * SPREAD) ** 2 + sigma**2
    gap = x[:, None] - alpha[:, None] * centres()
    weight = (-gap.square().sum(-1) / (2 * variance)).softmax(1)
    eps = sigma * (weight[..., None] * gap).sum(1) / variance
    return (x - sigma * eps) / alpha


def ode(x: Tensor, start: float, path: NoisePath, steps: int = 100) -> Tensor:
    """Return the end of the exact probability flow from index `start`."""
    grid = torch.linspace(start, 0, steps + 1).round().double()
    for here, there in pairwise(grid):
        (a, s), (b, r) = path.levels(here[None]), path.levels(there[None])
        x0 = exact(x, here.expand(len(x)), path)
        x = float(b) * x0 + float(r / s) * (x - float(a) * x0)
    return x


def sampled(n: int, generator: torch.Generator) -> Tensor:
    """Return ring data."""
    which = torch.randint(MODES, (n,), generator=generator)
    return centres()[which] + SPREAD * torch.randn(n, 2, generator=generator)


class Distilling(Objective):
    """The student: at each of four timesteps, the end of the exact flow."""

    def __init__(self, net: Network, index: Tensor, x: Tensor, end: Tensor) -> None:
        self.net, self.index, self.x, self.end = net, index, x, end

    def groups(self) -> list[Group]:
        """All weights."""
        return [Group("student", self.net.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the squared error of x0hat."""
        item = rows.items(len(self.x))
        said = self.net(self.x[item], self.index[item], NONE[torch.zeros(len(item), dtype=torch.long)])
        return Loss((said.x0 - self.end[item]).square().mean(1))


class Denoising(Objective):
    """The many-step model: the error of eps."""

    def __init__(self, net: Network) -> None:
        self.net = net

    def groups(self) -> list[Group]:
        """All weights."""
        return [Group("student", self.net.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the error against the exact prediction."""
        which = rows.integers(0, MODES)
        clean, index = centres()[which] + SPREAD * rows.normal(2), rows.integers(1, 1001).double()
        x = self.net.path.noised(clean, rows.normal(2), torch.zeros_like(index), index)
        alpha, sigma = (v.float().view(-1, 1) for v in self.net.path.levels(index))
        eps = (x - alpha * exact(x, index, self.net.path)) / sigma
        said = self.net(x, index, NONE[torch.zeros(len(x), dtype=torch.long)])
        return Loss((said.eps - eps).square().mean(1))


def fitted(
    objective: Objective, folder: Path, updates: int, lr: float, batch: int, seed: int = 0, look: Any = None
) -> dict[str, Tensor]:
    """Train and return the weights. look: told of every update and its figures."""
    run = RunSettings(updates=updates, batch=batch, save_every=100_000, keep=1, seed=seed)
    told = OptimizerSettings(lr=lr, warmup=0, floor=1.0, ema=0.0, clip=1e9, betas=(0.9, 0.999))
    more = {} if look is None else {"on_update": look}
    return Trainer(objective, run, told, folder=folder, cpu=True, **more).run().weights["student"]


def decayed(objective: Objective, folder: Path, updates: int, lr: float, batch: int) -> dict[str, Tensor]:
    """Train with a cosine and an average, for models to begin from."""
    run = RunSettings(updates=updates, batch=batch, save_every=100_000, keep=1)
    told = OptimizerSettings(lr=lr, warmup=50, floor=0.0, ema=0.99, clip=1e9, betas=(0.9, 0.999))
    return Trainer(objective, run, told, folder=folder, cpu=True).run().weights["student"]


def student(folder: Path, updates: int = 6000, pairs: int = 60_000) -> dict[str, Tensor]:
    """Return the distilled four-step student, sharp by construction."""
    path, generator = path_of("sample"), torch.Generator().manual_seed(1)
    index, x, end = [], [], []
    for at in (1000.0, 750.0, 500.0, 250.0):
        n = pairs // 4
        alpha, sigma = path.levels(torch.tensor([at]))
        noised = float(alpha) * sampled(n, generator) + float(sigma) * torch.randn(n, 2, generator=generator)
        index.append(torch.full((n,), at, dtype=torch.float64))
        x.append(noised)
        end.append(ode(noised, at, path))
    objective = Distilling(network("sample"), torch.cat(index), torch.cat(x), torch.cat(end))
    return decayed(objective, folder / "student", updates, 2e-3, 512)


@dataclass(frozen=True)
class Ring:
    """Shares of samples: right-hand mode, within 4 std of a mode, the mean reward, distance to a mode."""

    right: float
    on: float
    reward: float
    distance: float


def checker(x: Tensor, prompts: Any = None) -> Tensor:
    """Return the reward [n] in [0, 1]: in a right-hand mode and close to its centre."""
    distance, nearest = torch.cdist(x.float(), centres()).min(1)
    right = centres()[nearest, 0] > 0.1
    return (right * (-(distance / (4 * SPREAD)).square()).exp()).double()


@torch.no_grad()
def figures(net: Network, kernel: Kernel, n: int = 4096) -> Ring:
    """Return the figures of samples that the kernel draws from fixed noise."""
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(n, 2, generator=generator)
    z = torch.randn(n, len(kernel), 2, generator=generator)
    end = rollout(net, kernel, Conditions({"none": torch.zeros(n, 1)}), x, z).final
    distance, nearest = torch.cdist(end, centres()).min(1)
    return Ring(
        float((centres()[nearest, 0] > 0.1).float().mean()),
        float((distance < 4 * SPREAD).float().mean()),
        float(checker(end).mean()),
        float(distance.mean()),
    )


class RightHand(Objective):
    """Naive tuning: the diffusion loss on right-hand data at the student's own timesteps."""

    def __init__(self, net: Network, kernel: Kernel) -> None:
        self.net, self.kernel = net, kernel

    def groups(self) -> list[Group]:
        """All weights."""
        return [Group("student", self.net.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the error of x0."""
        right = (centres()[:, 0] > 0.1).nonzero()[:, 0]
        clean = centres()[right[rows.integers(0, len(right))]] + SPREAD * rows.normal(2)
        index = self.kernel.index[rows.integers(0, len(self.kernel))]
        x = self.net.path.noised(clean, rows.normal(2), torch.zeros_like(index), index)
        said = self.net(x, index, NONE[torch.zeros(len(x), dtype=torch.long)])
        return Loss((said.x0 - clean).square().mean(1))


def sharpness(folder: Path) -> dict[str, Ring]:
    """Return the table of PSO on the ring: start, naive, with and without the anchor."""
    base, kernel = student(folder), Kernel.renoise(path_of("sample"), 4)
    found = {"student": figures(network("sample", base), kernel)}
    for updates in (100, 1000):
        net = network("sample", base)
        net.put(fitted(RightHand(net, kernel), folder / f"naive-{updates}", updates, 1e-4, 256))
        found[f"naive, {updates}"] = figures(net, kernel)
    for name, anchor, updates in (("PSO, no anchor, 400", 0.0, 400), ("PSO, anchor, 800", 200.0, 800)):
        net = network("sample", base)
        told = PSOSettings(beta=1.0, anchor=anchor, start="independent", reduce="trajectory", patience=50)
        objective = PSO(net, kernel, NONE, [""] * PROMPTS, told, scorer=checker)
        net.put(fitted(objective, folder / name.replace(" ", "-"), updates, 1e-4, 128))
        found[name] = figures(net, kernel)
    return found


LOOKS = (20, 40, 60)
SPO_BATCH, TRAJECTORY_BATCH = 32, 26
"""Prompts of an update at equal evaluations of the network, those of training included.

A prompt of SPO costs 5 + 15 x 4 to draw and 15 x 2 to train (policy and reference, one state for both
candidates), one of trajectories 2 x 20 and 2 x 19 x 2: 95 against 116.
"""


def detail(seeds: int, folder: Path) -> dict[str, list[float]]:
    """Return the gain in mean |offset error| after 20, 40 and 60 updates of SPO and of trajectory preference,
    with and without layout taste in the labels (A = 1, 0), mean over seeds; the base's error as "base"."""
    base = decayed(Denoising(network("epsilon")), folder / "many", 6000, 2e-3, 512)
    kernel = Kernel.ddim(path_of("epsilon"), 20, 1.0)
    taste = torch.tensor([1.0, -1, -1, 1, 1, 1, -1, -1])
    start = offset_error(network("epsilon", base), kernel)
    found: dict[str, list[float]] = {"base": [start]}
    for name in ("SPO", "trajectory"):
        for a in (0.0, 1.0):

            def reward(x: Tensor, prompts: Any = None, a: float = a) -> Tensor:
                offset, nearest = offsets(x.float())
                return (a * taste[nearest] - (offset - 0.1).abs()).double()

            errors = []
            for seed in range(seeds):
                net = network("epsilon", base)
                errors.append(_tuned(name, net, kernel, reward, folder / f"{name}-{a:g}-{seed}", seed))
            found[f"{name}, A = {a:g}"] = (start - torch.tensor(errors).mean(0)).tolist()
    return found


def _tuned(name: str, net: Network, kernel: Kernel, reward: Any, folder: Path, seed: int) -> list[float]:
    """Return the error after each of `LOOKS` updates."""
    common: dict[str, Any] = {"beta": 10.0, "clip": "none", "patience": 50}
    if name == "SPO":
        told = SPOSettings(**common, guidance=1.0, threshold=0.0, candidates=4, first=4)
        objective: Any = SPO(net, kernel, NONE, [""] * PROMPTS, told, scorer=reward)
    else:
        other = PSOSettings(**common, anchor=0.0, start="independent", reduce="step")
        objective = PSO(net, kernel, NONE, [""] * PROMPTS, other, scorer=reward)
    errors: list[float] = []

    def look(update: int, figures: Any) -> None:
        if update + 1 in LOOKS:
            errors.append(offset_error(net, kernel))

    fitted(objective, folder, LOOKS[-1], 2e-5, SPO_BATCH if name == "SPO" else TRAJECTORY_BATCH, seed, look)
    return errors


def offsets(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the radial offset of samples from their mode [n], and the mode."""
    nearest = torch.cdist(x, centres()).min(1).indices
    outward = centres()[nearest] / RADIUS
    return ((x - centres()[nearest]) * outward).sum(1), nearest


@torch.no_grad()
def offset_error(net: Network, kernel: Kernel, n: int = 4096) -> float:
    """Return the mean |offset - 0.1| of samples from fixed noise."""
    generator = torch.Generator().manual_seed(98)
    x, z = torch.randn(n, 2, generator=generator), torch.randn(n, len(kernel), 2, generator=generator)
    end = rollout(net, kernel, Conditions({"none": torch.zeros(n, 1)}), x, z).final
    return float((offsets(end)[0] - 0.1).abs().mean())
