"""Small 3D molecules: a diffusion model of one's own loop, steered by what RDKit computes.

`enumerate.py` makes the training set, `network.py` is the equivariant network, `diffusion.py` its noise and
jumps, `sampling.py` the loop with a crowd in it, `rewards.py` what molecules are worth. Needs
`pip install "diffplug[molecules]"`; `python -m diffplug.demos.molecules` is the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.demos.molecules.network import MoleculeNetwork as MoleculeNetwork
    from diffplug.demos.molecules.network import load_network as load_network
    from diffplug.demos.molecules.rewards import MoleculeReward as MoleculeReward
    from diffplug.demos.molecules.runs import molecule_fk as molecule_fk
    from diffplug.demos.molecules.sampling import sample as sample

_HOMES = {
    "MoleculeNetwork": "diffplug.demos.molecules.network",
    "MoleculeReward": "diffplug.demos.molecules.rewards",
    "load_network": "diffplug.demos.molecules.network",
    "molecule_fk": "diffplug.demos.molecules.runs",
    "sample": "diffplug.demos.molecules.sampling",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
