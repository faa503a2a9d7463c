"""What a molecule is worth, by RDKit: validity, logP, QED, or a weighted sum; NaN for what is no molecule.

In a crowd an invalid molecule gets the crowd's `floor` on the way, where there is no molecule yet, and ends
its particle at the end. logP is won by carbon chains and QED saturates, so look at the drawings too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffplug.registry import unknown

FLOOR = -3.0


def _logp(molecule: Any) -> float:
    from rdkit.Chem import Crippen

    return float(Crippen.MolLogP(molecule))


def _qed(molecule: Any) -> float:
    from rdkit.Chem import QED

    return float(QED.qed(molecule))


PROPERTIES: dict[str, Callable[[Any], float]] = {"valid": lambda molecule: 1.0, "logp": _logp, "qed": _qed}


@dataclass(frozen=True)
class MoleculeReward:
    """A reward in [molecule or None] and labels: the weighted sum of properties of each, NaN for None.

    terms: weight by name of `PROPERTIES`. Raises ValueError for unknown names, and for none.
    """

    terms: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for name, weight in self.terms:
            if name not in PROPERTIES:
                raise unknown("property of a molecule", name, sorted(PROPERTIES))
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight}: give a finite number")
        if not self.terms:
            raise ValueError(f"a reward needs a property: give one of {', '.join(PROPERTIES)}, or a sum")

    @classmethod
    def parse(cls, text: str) -> MoleculeReward:
        """Return the reward written as "logp", "5*qed" or "logp + 5*qed"."""
        terms = []
        for part in text.replace("-", "+-").split("+"):
            factor, star, name = part.strip().rpartition("*")
            sign = -1.0 if not star and name.startswith("-") else 1.0
            try:
                weight = float(factor.replace(" ", "")) if star else sign
            except ValueError:
                raise ValueError(f"reward {text!r}: {factor!r} is no number, write 'logp + 5*qed'") from None
            if part.strip():
                terms.append((name.strip().removeprefix("-").strip(), weight))
        return cls(tuple(terms))

    def __call__(self, molecules: Sequence[Any], labels: Sequence[Any]) -> list[float]:
        """Return one number for each molecule."""
        known: dict[int, float] = {}
        return [self._of(molecule, known) for molecule in molecules]

    def _of(self, molecule: Any, known: dict[int, float]) -> float:
        if molecule is None:
            return math.nan
        if id(molecule) not in known:
            known[id(molecule)] = sum(weight * PROPERTIES[name](molecule) for name, weight in self.terms)
        return known[id(molecule)]
