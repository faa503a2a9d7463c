"""A small equivariant network: rotate or mirror a molecule and what it says of it turns along.

Messages between all pairs see distances alone; they update atoms, pairs, and, along the line between two
atoms, coordinates (as arXiv 2102.09844, with bonds as in arXiv 2309.17296). Plain PyTorch, dense, padded.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffplug.demos.molecules.diffusion import STEPS, Denoised, Prior, signal
from diffplug.demos.molecules.graphs import ATOM_CLASSES, BOND_CLASSES, Graphs, centred

_TIMES = 6


@dataclass(frozen=True)
class Card:
    """The sizes of a network: heavy atoms at most, features of an atom or a pair, layers."""

    largest: int = 6
    width: int = 56
    layers: int = 4


def _two_layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


class Layer(nn.Module):
    """One round of messages. h: `[n, N, w]` atoms; e: `[n, N, N, w]` pairs; x: `[n, N, 3]` coordinates."""

    def __init__(self, width: int, largest: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(largest)
        self.message = nn.Sequential(_two_layers(3 * width + 2, width, width), nn.SiLU())
        self.atom = _two_layers(2 * width, width, width)
        self.pair = nn.Linear(width, width)
        self.pull = _two_layers(width, width, 1)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(
        self, h: Tensor, e: Tensor, x: Tensor, at_input: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three updated. at_input: squared distances `[n, N, N, 1]` of the state that came in."""
        size = h.shape[1]
        apart = x[:, :, None] - x[:, None, :]
        square = apart.square().sum(-1, keepdim=True)
        one, other = h[:, :, None].expand(-1, -1, size, -1), h[:, None].expand(-1, size, -1, -1)
        message = self.message(torch.cat([one, other, e, square, at_input], -1)) * pairs
        h = self.norms[0](h + self.atom(torch.cat([h, message.sum(2) * self.scale], -1)))
        direction = apart / (1 + (square + 1e-8).sqrt())
        x = x + (direction * self.pull(message) * pairs).sum(2)
        return h, self.norms[1](e + self.pair(message + message.transpose(1, 2))), x


class MoleculeNetwork(nn.Module):
    """Says what clean molecules a noised batch comes from."""

    def __init__(self, card: Card, prior: Prior) -> None:
        super().__init__()
        self.card, w = card, card.width
        self.register_buffer("atom_prior", prior.atoms.clone())
        self.register_buffer("bond_prior", prior.bonds.clone())
        self.atom_in = nn.Linear(ATOM_CLASSES + _TIMES, w)
        self.pair_in = nn.Linear(BOND_CLASSES + 1, w)
        self.layers = nn.ModuleList([Layer(w, card.largest) for _ in range(card.layers)])
        self.atom_out = _two_layers(w, w, ATOM_CLASSES)
        self.pair_out = _two_layers(w, w, BOND_CLASSES)

    @property
    def prior(self) -> Prior:
        """Return where noise ends."""
        return Prior(self.atom_prior, self.bond_prior)  # type: ignore[arg-type]

    def forward(self, state: Graphs, t: Tensor) -> Denoised:
        """Return the clean prediction of states at the times t, `[n]` in 0..100."""
        present, pairs = state.present[:, :, None].float(), state.pairs[..., None].float()
        square = (state.x[:, :, None] - state.x[:, None, :]).square().sum(-1, keepdim=True)
        atoms = nn.functional.one_hot(state.atoms, ATOM_CLASSES).float()
        bonds = nn.functional.one_hot(state.bonds, BOND_CLASSES).float()
        time = _time_features(t)[:, None].expand(-1, state.present.shape[1], -1)
        h = self.atom_in(torch.cat([atoms, time], -1)) * present
        e = self.pair_in(torch.cat([bonds, square], -1)) * pairs
        x = state.x
        for layer in self.layers:
            h, e, x = layer(h, e, x, square, pairs)
        logits = self.pair_out(e + e.transpose(1, 2))
        return Denoised(centred(x, state.present), self.atom_out(h), logits)


def _time_features(t: Tensor) -> Tensor:
    """Return `[n, 6]` features of times in 0..100."""
    share = (t.float() / STEPS)[:, None]
    waves = torch.arange(1, 3) * math.pi * share
    return torch.cat([share, share.square(), waves.sin(), waves.cos()], -1)


def signals(t: Tensor) -> Tensor:
    """Return abar of times `[n]`, float64."""
    return torch.tensor([signal(float(one)) for one in t], dtype=torch.float64)


def save_network(network: MoleculeNetwork, folder: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` (half precision) and `model.json` into a folder."""
    from safetensors.torch import save_file

    from diffplug.files import atomic_path, output_folder, write_json

    target = output_folder(folder)
    with atomic_path(target / "model.safetensors") as path:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)
    write_json(target / "model.json", asdict(network.card))


def load_network(folder: str | os.PathLike[str] | None = None) -> MoleculeNetwork:
    """Return a saved network, by default the one that ships. Raises ValueError for a folder without one."""
    from safetensors.torch import load_file

    source = Path(folder) if folder is not None else Path(__file__).parent / "weights"
    try:
        card = Card(**json.loads((source / "model.json").read_text("utf-8")))
        empty = Prior(torch.zeros(ATOM_CLASSES), torch.zeros(BOND_CLASSES))
        network = MoleculeNetwork(card, empty)
        weights = load_file(source / "model.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except FileNotFoundError:
        raise ValueError(
            f"{os.fspath(source)!r} holds no model.json and model.safetensors: train one with "
            "python -m diffplug.demos.molecules train"
        ) from None
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{os.fspath(source)!r} holds no readable network: {reason}") from error
    return network.eval().requires_grad_(False)
