"""What the model knows of chemistry (four elements, three bonds), and RDKit, imported when it is needed."""

from __future__ import annotations

from typing import Any

SYMBOLS = ("C", "N", "O", "F")
VALENCES = {"C": 4, "N": 3, "O": 2, "F": 1}
BOND_TYPES = ("", "SINGLE", "DOUBLE", "TRIPLE")
LENGTH = 1.4
"""Unit of coordinates, in Å: about one bond."""


def chemistry() -> Any:
    """Return `rdkit.Chem`, its log silenced. Raises ImportError, in one line, where RDKit is missing."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError as error:
        raise ImportError('molecules are judged by RDKit: pip install "diffplug[molecules]"') from error
    RDLogger.DisableLog("rdApp.*")
    return Chem
