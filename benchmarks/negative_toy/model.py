"""A small transformer that reads its prompt by cross-attention, trained on the grid's exact answers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from benchmarks.negative_toy.grid import OPEN, SIDE, World, exact, path_of, sampled
from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.speedupnet.guidance_states import TEXT, TextNetwork
from diffplug.training.trainer import Trainer

WIDTH, TOKENS, BLOCKS, TEXT_WIDTH = 48, 4, 2, 24
FORM = CallForm("x", "timestep", 1.0, 1.0, (2,), {"return_dict": False}, (TEXT,))


class Base(nn.Module):
    """eps of a point: four tokens of width 48, two blocks, told the time in each; some 100,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(2, TOKENS * WIDTH)
        self.time = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH * BLOCKS))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(WIDTH, 4, WIDTH // 4, cross_attention_dim=TEXT_WIDTH, activation_fn="gelu")
            for _ in range(BLOCKS)
        )
        self.leave = nn.Sequential(nn.LayerNorm(WIDTH), nn.Flatten(), nn.Linear(TOKENS * WIDTH, 2))

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        angle = timestep[:, None] / 1000 * math.pi * 2.0 ** torch.arange(-1, 15, device=x.device) / 4
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)).chunk(BLOCKS, 1)
        hidden = self.enter(x).view(-1, TOKENS, WIDTH)
        for block, time in zip(self.blocks, told, strict=True):
            hidden = block(hidden + time[:, None], encoder_hidden_states=encoder_hidden_states)
        return (self.leave(hidden),)


def encoded(prompts: Tensor) -> Conditions:
    """Return prompts [n, 2] as two tokens each: a word of its own for every column, row, and nothing."""
    table = torch.randn(2 * (SIDE + 1), TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
    return Conditions({TEXT: table[prompts + torch.tensor([0, SIDE + 1])]})


def network_of(denoiser: nn.Module) -> TextNetwork:
    """Return a frozen denoiser as the trainers call it."""
    return TextNetwork(denoiser.requires_grad_(False).eval(), path_of(), FORM)


class Learning(Objective):
    """The error of eps to the closed form, in a world; each word of a prompt is left open at times.

    Half of each coordinate's states lie farther out than data do: there too the closed form knows the answer.
    """

    def __init__(self, denoiser: nn.Module, world: World) -> None:
        self.denoiser, self.world, self.path = denoiser.requires_grad_(True).train(), world, path_of()

    def groups(self) -> list[Group]:
        """All weights."""
        return [Group("base", dict(self.denoiser.named_parameters()))]

    def loss(self, rows: Rows) -> Loss:
        """Return the squared error of each row."""
        n = len(rows)
        words = torch.stack([rows.integers(0, SIDE), rows.integers(0, SIDE)], 1)
        left_open = (rows.uniform(2) > 0.7) | (rows.uniform() < 0.12)[:, None]
        prompts = torch.where(left_open, OPEN, words)
        clean = sampled(prompts, rows.uniform(), rows.normal(2), self.world)
        clean = clean * (
            1 + 6 * (rows.uniform(2).float() - 0.5).clamp(min=0)
        )  # where guidance throws samples
        index = rows.integers(1, 1001).double()
        x = self.path.noised(clean, rows.normal(2), torch.zeros(n, dtype=torch.float64), index)
        (said,) = self.denoiser(x, (index - 1).float(), encoded(prompts).leaves[TEXT])
        return Loss((said - exact(x, index, prompts, self.path, self.world)).square().mean(1))


def fitted(objective: Objective, group: str, folder: Path, updates: int, lr: float, batch: int = 64) -> Any:
    """Train an objective with a cosine and an average; return the weights of a group."""
    run = RunSettings(updates=updates, batch=batch, save_every=100_000, keep=1)
    told = OptimizerSettings(lr=lr, warmup=min(50, updates // 10), floor=0.02, ema=0.99, betas=(0.9, 0.99))
    return Trainer(objective, run, told, folder=folder, cpu=True).run().weights[group]


def trained_base(folder: Path, updates: int = 3000) -> TextNetwork:
    """Return the base model of the grid."""
    torch.manual_seed(0)
    denoiser = Base()
    denoiser.load_state_dict(fitted(Learning(denoiser, World()), "base", folder / "base", updates, 2e-3, 128))
    return network_of(denoiser)


def tuned(base: TextNetwork, world: World, folder: Path, updates: int, lr: float) -> TextNetwork:
    """Return the base fine-tuned to another world; the base stays as it is."""
    denoiser = copy.deepcopy(base.denoiser)
    denoiser.load_state_dict(fitted(Learning(denoiser, world), "base", folder, updates, lr, 128))
    return network_of(denoiser)
