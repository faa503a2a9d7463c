"""A sheet of drawings: molecules in rows, each with its SMILES and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from diffplug.demos.contact_sheet import Cell, contact_sheet
from diffplug.demos.molecules.graphs import smiles

_SIZE = (200, 180)


def drawings(
    rows: Mapping[str, Sequence[Any]],
    reward: Callable[..., Any],
    *,
    title: str = "",
    footer: str = "",
    name: str = "reward",
) -> Image.Image:
    """Return a picture with a row of drawings for each title; no molecule is a blank with a cross.

    rows: RDKit molecules by title, as many for each. reward: rates them, `name` is how it is called.
    """
    columns = [f"group {i + 1}" for i in range(max(len(row) for row in rows.values()))]
    cells = [[_cell(molecule, reward, name) for molecule in row] for row in rows.values()]
    return contact_sheet(
        cells, row_labels=list(rows), column_labels=columns, title=title, footer=footer, size=_SIZE[0]
    )


def _cell(molecule: Any, reward: Callable[..., Any], name: str) -> Cell:
    if molecule is None:
        return Cell([Image.new("RGB", _SIZE, "white")], [False])
    from rdkit.Chem import Draw

    worth = float(reward([molecule], [""])[0])
    legend = f"{smiles(molecule)}   {name} {worth:.2f}" if math.isfinite(worth) else smiles(molecule)
    options = Draw.MolDrawOptions()
    options.fixedBondLength, options.padding, options.legendFraction = 30.0, 0.14, 0.16
    return Cell([Draw.MolToImage(molecule, size=_SIZE, legend=legend, options=options)], [True])
