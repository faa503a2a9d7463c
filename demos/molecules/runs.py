"""Free and steered runs beside each other: what they reach, how many molecules are valid, how many differ."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.demos.molecules.graphs import smiles
from diffplug.demos.molecules.network import MoleculeNetwork
from diffplug.demos.molecules.rewards import FLOOR
from diffplug.demos.molecules.sampling import sample
from diffplug.registry import STEERERS
from diffplug.steering import BestOfN, CrowdResult, FeynmanKac, Resampling, Scoring


@dataclass(frozen=True)
class Handed:
    """What a way of drawing hands back: one molecule a group (None for none) and its reward."""

    title: str
    molecules: Sequence[Any]
    rewards: Tensor

    @property
    def mean(self) -> float:
        """Return the mean reward, the floor for what is no molecule."""
        return float(torch.where(torch.isfinite(self.rewards), self.rewards, FLOOR).mean())

    @property
    def valid(self) -> float:
        """Return the share of molecules."""
        return sum(molecule is not None for molecule in self.molecules) / max(len(self.molecules), 1)

    @property
    def names(self) -> list[str]:
        """Return the canonical SMILES of the molecules."""
        return [smiles(molecule) for molecule in self.molecules if molecule is not None]

    @property
    def different(self) -> float:
        """Return the share of different ones among the molecules."""
        return len(set(self.names)) / max(len(self.names), 1)


def molecule_fk(reward: Any, particles: int, strength: float) -> FeynmanKac:
    """Return Feynman-Kac steering as it suits molecules: one population, judged at every second of 25 calls.

    The first quarter is left alone, since there is no molecule yet.
    """
    return FeynmanKac(
        reward,
        particles=particles,
        strength=strength,
        scoring=Scoring(at=[i / 25 for i in range(7, 25, 2)]),
        selection=Resampling(ess_threshold=0.5, islands=1),
    )


def steerer_of(name: str, reward: Any, particles: int, strength: float) -> Any:
    """Return a rule by its name. Raises ValueError with the nearest names."""
    if name == "fk":
        return molecule_fk(reward, particles, strength)
    rule = STEERERS.get(name)
    options = {"strength": strength} if "strength" in inspect.signature(rule).parameters else {}
    return rule(reward, particles=particles, **options)


def free_draws(network: MoleculeNetwork, reward: Any, particles: int, **how: Any) -> list[Handed]:
    """Return a free draw of every group, and the best of its draws. how: as in `sample`."""
    found = sample(network, BestOfN(reward, particles=particles), **how)
    firsts = list(range(0, len(found.all), particles))
    return [_handed("a free draw", found, firsts), _handed(f"best of {particles}", found, found.best_rows)]


def steered(network: MoleculeNetwork, rule: Any, **how: Any) -> list[Handed]:
    """Return what a rule hands back: drawn by the weights, where it has some, and its best."""
    found, name = sample(network, rule, **how), type(rule).__name__
    best = _handed(f"{name}, best", found, found.best_rows)
    if not found.has_weights:
        return [best]
    return [_handed(f"{name}, drawn by weight", found, found.sample_rows), best]


def compared(network: MoleculeNetwork, rule: Any, reward: Any, **how: Any) -> list[Handed]:
    """Return what free draws and a rule hand back, from the same seeds and as many network rows."""
    free = free_draws(network, reward, rule.particles, **how)
    return free if isinstance(rule, BestOfN) else [*free, *steered(network, rule, **how)]


def _handed(title: str, result: CrowdResult, rows: Sequence[int]) -> Handed:
    rewards = result.rewards.reshape(-1)[list(rows)]
    return Handed(title, [result.all[row] for row in rows], rewards)


def table(runs: Sequence[Handed]) -> str:
    """Return lines with the mean reward and the shares of valid and of different molecules."""
    lines = [f"{'':28s} reward   valid  different"]
    for run in runs:
        lines.append(f"{run.title:28s} {run.mean:6.2f} {run.valid:7.1%} {run.different:9.1%}")
    return "\n".join(lines)
