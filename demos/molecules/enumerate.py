"""Small molecules, enumerated: grown atom by atom, each once, with 3D coordinates by RDKit's force field.

No file is downloaded: the training set is what chemistry's valences allow, less what falls apart in a flask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from diffplug.demos.molecules.chemistry import BOND_TYPES, SYMBOLS, VALENCES, chemistry

_SEEDS = ("C", "N", "O")
_FORBIDDEN = (
    "O~O",  # peroxides
    "[N,O]~F",
    "[#7,#8]~[#7,#8]~[#7,#8]",
    "*=[#6]=*",  # cumulenes, ketenes, isocyanates
    "[R]#[R]",  # strained rings
    "[r3]=*",
    "[r4]=[r4]",
    "[R;!R1;r3]",  # fused and spiro small rings, cages
    "[R;!R1;r4]",
    "[#6;!H0][NX2]=O",  # nitroso compounds become oximes
    "[OX2H1][CX4][OX2H1]",  # hydrates, hemiaminals, aminals
    "[OX2H1][CX4][NX3;H1,H2]",
    "[NX3;H1,H2][CX4][NX3;H1,H2]",
    "[OX2H1][CX3]=[CX3]",  # enols, enamines, imidic acids: their tautomers are meant
    "[NX3;H1,H2][CX3]=[CX3]",
    "[OX2H1][#6]=[NX2]",
    "F[CX4][OX2H1,NX3]",  # lose hydrogen fluoride
    "[OX2H1,NX3;H1,H2]C#[C,N]",
    "[NX2;H1]=*",
    "[F,O;H1][#7]",
)


def enumerated(largest: int) -> dict[int, list[str]]:
    """Return the canonical SMILES of all molecules of C, N, O and F with up to so many heavy atoms, by size.

    Takes seconds up to five atoms, half a minute for six. Raises ImportError without RDKit.
    """
    chem = chemistry()
    patterns = [chem.MolFromSmarts(text) for text in _FORBIDDEN]
    level = set(_SEEDS)
    found = {1: sorted(level)}
    for size in range(2, largest + 1):
        level = _closed({new for old in level for new in _grown(chem, old)}, chem)
        level = {smiles for smiles in level if not _falls_apart(chem.MolFromSmiles(smiles), patterns)}
        found[size] = sorted(level)
    return found


def _falls_apart(molecule: Any, patterns: Sequence[Any]) -> bool:
    return any(molecule.HasSubstructMatch(pattern) for pattern in patterns)


def _grown(chem: Any, smiles: str) -> Iterator[str]:
    """Return molecules with one atom more."""
    molecule = _kekule(chem, smiles)
    for atom in molecule.GetAtoms():
        for symbol in SYMBOLS:
            for order in range(1, min(_free(atom), VALENCES[symbol], 3) + 1):
                grown = chem.RWMol(molecule)
                grown.AddBond(atom.GetIdx(), grown.AddAtom(chem.Atom(symbol)), bond_type(chem, order))
                yield from _accepted(chem, grown)


def _closed(level: set[str], chem: Any) -> set[str]:
    """Return molecules of one size with all rings that they can close."""
    new = set(level)
    while new:
        new = {ring for smiles in new for ring in _ringed(chem, smiles)} - level
        level |= new
    return level


def _ringed(chem: Any, smiles: str) -> Iterator[str]:
    """Return molecules with a ring more, or with a higher bond in a ring."""
    molecule = _kekule(chem, smiles)
    for one, other in combinations(molecule.GetAtoms(), 2):
        i, j = one.GetIdx(), other.GetIdx()
        bond = molecule.GetBondBetweenAtoms(i, j)
        if min(_free(one), _free(other)) < 1 or (bond is not None and not bond.IsInRing()):
            continue
        ring = chem.RWMol(molecule)
        if bond is None:
            ring.AddBond(i, j, bond_type(chem, 1))
        elif bond.GetBondTypeAsDouble() < 3:
            order = int(bond.GetBondTypeAsDouble()) + 1
            ring.GetBondBetweenAtoms(i, j).SetBondType(bond_type(chem, order))
        else:
            continue
        yield from _accepted(chem, ring)


def _accepted(chem: Any, grown: Any) -> Iterator[str]:
    for atom in grown.GetAtoms():
        atom.SetNumExplicitHs(0)
        atom.SetNoImplicit(False)
    if chem.SanitizeMol(grown, catchErrors=True) == chem.SanitizeFlags.SANITIZE_NONE:
        yield chem.MolToSmiles(grown)


def _kekule(chem: Any, smiles: str) -> Any:
    molecule = chem.MolFromSmiles(smiles)
    chem.Kekulize(molecule, clearAromaticFlags=True)
    return molecule


def _free(atom: Any) -> int:
    return int(atom.GetTotalNumHs())


def bond_type(chem: Any, order: int) -> Any:
    """Return RDKit's bond type of an order from 1 to 3."""
    return getattr(chem.BondType, BOND_TYPES[order])


def placed(smiles: str, seed: int = 0) -> tuple[list[int], list[tuple[int, int, int]], Any] | None:
    """Return atom classes, bonds `(i, j, order)` and coordinates `[n, 3]` in Å of the heavy atoms.

    Coordinates are ETKDG's, refined by MMFF; None where a molecule cannot be embedded.
    """
    from rdkit.Chem import AllChem

    chem = chemistry()
    full = chem.AddHs(chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(full, randomSeed=seed) != 0:
        return None
    if AllChem.MMFFHasAllMoleculeParams(full):
        AllChem.MMFFOptimizeMolecule(full, maxIters=500)
    bare = chem.RemoveHs(full)
    chem.Kekulize(bare, clearAromaticFlags=True)
    atoms = [SYMBOLS.index(atom.GetSymbol()) for atom in bare.GetAtoms()]
    bonds = [
        (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondTypeAsDouble()))
        for bond in bare.GetBonds()
    ]
    return atoms, bonds, bare.GetConformer().GetPositions()
