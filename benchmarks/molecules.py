"""Steering small molecules by logP and QED, beside free draws at as many network rows: three seeds.

    python -m benchmarks.molecules [--groups 96] [--json benchmarks/results/molecules.json]

Every group has 8 particles, 6 heavy atoms and 25 jumps. A reward is the floor of -3 for what is no molecule.
"New": the share of different molecules handed back that are not among those enumerated for training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

from diffplug.demos.molecules.enumerate import enumerated
from diffplug.demos.molecules.network import load_network
from diffplug.demos.molecules.rewards import MoleculeReward
from diffplug.demos.molecules.runs import Handed, free_draws, molecule_fk, steered
from diffplug.files import write_json
from diffplug.steering import SVDD, TwoLevel

ATOMS, JUMPS, PARTICLES = 6, 25, 8
STRENGTHS = {"logp": (1.0, 3.0), "5*qed": (2.0, 5.0)}


def rules(reward: MoleculeReward, weak: float, strong: float) -> dict[str, Any]:
    """Return the rules that are compared, by title."""
    return {
        f"FK, strength {weak:g}": molecule_fk(reward, PARTICLES, weak),
        f"FK, strength {strong:g}": molecule_fk(reward, PARTICLES, strong),
        f"SVDD, every 4th call, strength {strong:g}": SVDD(
            reward, particles=PARTICLES, strength=strong, block=4
        ),
        f"two-level, every 4th call, strength {strong:g}": TwoLevel(
            reward, particles=PARTICLES, strength=strong, block=4
        ),
    }


def figures(run: Handed, known: set[str]) -> dict[str, float]:
    """Return what one way of drawing reached in one seed."""
    names = set(run.names)
    return {
        "reward": run.mean,
        "valid": run.valid,
        "different": run.different,
        "new": len(names - known) / max(len(names), 1),
    }


def measured(text: str, groups: int, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return, by title and figure, the numbers of every seed."""
    network, reward = load_network(), MoleculeReward.parse(text)
    known = {smiles for found in enumerated(ATOMS).values() for smiles in found}
    out: dict[str, dict[str, list[float]]] = {}

    def note(title: str, run: Handed) -> None:
        row = out.setdefault(title, {})
        for key, value in figures(run, known).items():
            row.setdefault(key, []).append(value)

    for seed in range(seeds):
        how = {"groups": groups, "atoms": ATOMS, "jumps": JUMPS, "seed": 1000 * seed}
        start = process_time()
        for run in free_draws(network, reward, PARTICLES, **how):
            note(run.title, run)
        print(f"{text}, seed {seed}, free: {process_time() - start:.1f} CPU seconds", flush=True)
        for title, rule in rules(reward, *STRENGTHS[text]).items():
            start = process_time()
            for run in steered(network, rule, **how):
                note(f"{title}, {run.title.rpartition(', ')[2]}", run)
            print(f"{text}, seed {seed}, {title}: {process_time() - start:.1f} CPU seconds", flush=True)
    return out


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return lines of means over seeds and their standard deviations."""
    lines = [f"{'':56s} reward           valid    different  new"]
    for name, row in found.items():
        spread = stdev(row["reward"]) if len(row["reward"]) > 1 else 0.0
        shares = "  ".join(f"{mean(row[key]):7.1%}" for key in ("valid", "different", "new"))
        lines.append(f"{name:56s} {mean(row['reward']):6.2f} ± {spread:.2f}  {shares}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = {text: measured(text, given.groups, given.seeds) for text in STRENGTHS}
    for text, rows in found.items():
        print(f"\n{text}\n{table(rows)}")
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
