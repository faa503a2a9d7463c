"""Molecules as tensors: coordinates, atom classes and bond classes, padded to one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.demos.molecules.chemistry import LENGTH, SYMBOLS, chemistry
from diffplug.demos.molecules.enumerate import bond_type, placed

ATOM_CLASSES = len(SYMBOLS)
BOND_CLASSES = 4  # 0: no bond


@dataclass(frozen=True)
class Graphs:
    """A batch of molecules of at most N heavy atoms.

    x: `[n, N, 3]` coordinates in units of 1.4 Å, their mean zero. atoms: `[n, N]` classes. bonds: `[n, N, N]`
    classes, symmetric, 0 on the diagonal. present: `[n, N]` bool, False for padding.
    """

    x: Tensor
    atoms: Tensor
    bonds: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> Graphs:
        return Graphs(**{entry.name: getattr(self, entry.name)[rows] for entry in fields(self)})

    @property
    def pairs(self) -> Tensor:
        """Return which pairs are of two different atoms that are there, `[n, N, N]` bool."""
        both = self.present[:, :, None] & self.present[:, None, :]
        return both & ~torch.eye(self.present.shape[1], dtype=torch.bool, device=both.device)


def centred(x: Tensor, present: Tensor) -> Tensor:
    """Return coordinates with mean zero over the atoms that are there, and zero at padding."""
    kept = present[:, :, None]
    mean = (x * kept).sum(1, keepdim=True) / present.sum(1).clamp(min=1)[:, None, None]
    return (x - mean) * kept


def graphs_of(texts: Sequence[str], largest: int) -> tuple[Graphs, list[str]]:
    """Return the molecules of SMILES that RDKit can place in space, and their SMILES."""
    found = [(smiles, place) for smiles in texts if (place := placed(smiles)) is not None]
    n = len(found)
    x, atoms = torch.zeros(n, largest, 3), torch.zeros(n, largest, dtype=torch.long)
    bonds = torch.zeros(n, largest, largest, dtype=torch.long)
    present = torch.zeros(n, largest, dtype=torch.bool)
    for row, (_, (kinds, joined, position)) in enumerate(found):
        size = len(kinds)
        x[row, :size] = torch.from_numpy(position).float() / LENGTH
        atoms[row, :size] = torch.tensor(kinds)
        present[row, :size] = True
        for i, j, order in joined:
            bonds[row, i, j] = bonds[row, j, i] = order
    return Graphs(centred(x, present), atoms, bonds, present), [smiles for smiles, _ in found]


def molecules(graphs: Graphs) -> list[Any]:
    """Return an RDKit molecule for every row, None where valences do not work out or it falls in pieces."""
    return list(_molecules(graphs))


def _molecules(graphs: Graphs) -> Iterator[Any]:
    chem = chemistry()
    atoms, bonds, present = graphs.atoms.tolist(), graphs.bonds.tolist(), graphs.present.tolist()
    made: dict[Any, Any] = {}
    for row in range(len(graphs)):
        size = sum(present[row])
        key = (tuple(atoms[row][:size]), tuple(tuple(line[:size]) for line in bonds[row][:size]))
        if key not in made:
            made[key] = _molecule(chem, *key)
        yield made[key]


def _molecule(chem: Any, atoms: Sequence[int], bonds: Sequence[Sequence[int]]) -> Any:
    """Return one molecule; None for one that RDKit refuses or that is not connected."""
    molecule = chem.RWMol()
    for kind in atoms:
        molecule.AddAtom(chem.Atom(SYMBOLS[kind]))
    for i, line in enumerate(bonds):
        for j in range(i):
            if line[j]:
                molecule.AddBond(i, j, bond_type(chem, line[j]))
    if chem.SanitizeMol(molecule, catchErrors=True) != chem.SanitizeFlags.SANITIZE_NONE:
        return None
    return molecule if len(chem.GetMolFrags(molecule)) == 1 else None


def smiles(molecule: Any) -> str:
    """Return the canonical SMILES of an RDKit molecule."""
    return str(chemistry().MolToSmiles(chemistry().RemoveHs(molecule)))


def save(graphs: Graphs, path: Path) -> None:
    """Write a batch as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    from diffplug.files import atomic_path

    tensors = {entry.name: getattr(graphs, entry.name).contiguous() for entry in fields(graphs)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load(path: Path) -> Graphs:
    """Return a batch that `save` wrote."""
    from safetensors.torch import load_file

    return Graphs(**load_file(path))
