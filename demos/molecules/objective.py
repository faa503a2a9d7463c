"""Training: noised molecules in, clean ones out, by the package's trainer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffplug.demos.molecules.diffusion import STEPS, Prior, noised
from diffplug.demos.molecules.graphs import Graphs
from diffplug.demos.molecules.network import Card, MoleculeNetwork, signals
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.trainer import Trainer

_COORDINATES, _ATOMS, _BONDS = 3.0, 0.4, 2.0
_LEAST, _MOST = 0.05, 1.5


@dataclass
class Denoising(Objective):
    """The loss of EQGAT-diff (arXiv 2309.17296): clip(SNR, .05, 1.5) (3 MSE + .4 CE(atoms) + 2 CE(bonds)).

    data: clean molecules, each of which comes once before any comes again.
    """

    network: MoleculeNetwork
    data: Graphs

    def groups(self) -> list[Group]:
        """Return all weights of the network as one group."""
        return [Group("network", dict(self.network.named_parameters()))]

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of some molecules, each at a time of its own."""
        clean = self.data[rows.items(len(self.data))]
        t = rows.integers(1, STEPS + 1)
        at = signals(t)
        out = self.network(noised(clean, at, self.network.prior, rows), t)
        present, pairs = clean.present, clean.pairs
        x = _mean((out.x - clean.x).square().mean(-1), present)
        atoms = _mean(_surprise(out.atoms, clean.atoms), present)
        bonds = _mean(_surprise(out.bonds, clean.bonds).flatten(1), pairs.flatten(1))
        weight = (at / (1 - at)).clamp(_LEAST, _MOST).float()
        errors = weight * (_COORDINATES * x + _ATOMS * atoms + _BONDS * bonds)
        log = {"x": x.mean(), "atoms": atoms.mean(), "bonds": bonds.mean()}
        return Loss(errors, log=log, timesteps=t)


def _surprise(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none")


def _mean(value: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of each row over what counts, `[n]`; zero for a row of a single atom's pairs."""
    return (value * counted).sum(1) / counted.sum(1).clamp(min=1)


def train(
    data: Graphs,
    folder: Path,
    *,
    updates: int = 10_000,
    batch: int = 128,
    card: Card | None = None,
    minutes: float | None = None,
    seed: int = 0,
) -> MoleculeNetwork:
    """Return a network trained on molecules; goes on where a run in the folder stopped.

    About ten minutes of one core with the defaults. minutes: stop, with what is learnt, after this long.
    Raises ValueError for a folder whose run had another network, batch, seed or number of molecules.
    """
    torch.manual_seed(seed)
    network = MoleculeNetwork(card or Card(), Prior.of(data))
    run = RunSettings(updates=updates, batch=batch, save_every=500, seed=seed)
    settings = OptimizerSettings(lr=1.5e-3, warmup=min(100, updates // 10), ema=0.999)
    config = {"card": asdict(network.card), "batch": batch, "seed": seed, "molecules": len(data)}
    trainer = Trainer(
        Denoising(network, data), run, settings, folder=folder, config=config, minutes=minutes, cpu=True
    )
    averaged = trainer.run().weights["network"]
    network.load_state_dict(averaged, strict=False)
    return network.eval().requires_grad_(False)
