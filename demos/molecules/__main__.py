"""Molecules on the command line: `python -m diffplug.demos.molecules sample`, and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
_DRAWN = 6


@app.callback()
def main() -> None:
    """Small molecules in 3D: a diffusion model that RDKit's judgement steers."""


@app.command()
@guarded
def sample(
    reward: Annotated[
        str, typer.Option(help="valid, logp, qed, or a sum such as 'logp + 5*qed'; a minus turns it round.")
    ] = "logp",
    steer: Annotated[str, typer.Option(help="A rule: fk, svdd, beam, best-of-n, ...")] = "fk",
    particles: Annotated[int, typer.Option(min=1, help="Molecules that compete in a group.")] = 8,
    strength: Annotated[
        float, typer.Option(min=0, help="How strongly; times the reward's spread, 1 to 3.")
    ] = 3,
    groups: Annotated[int, typer.Option(min=1, help="Molecules wanted, each from its own group.")] = 24,
    atoms: Annotated[int, typer.Option(help="Heavy atoms of a molecule.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Jumps from noise to molecule.")] = 25,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: Annotated[Path | None, typer.Option(help="Folder of a network of your own.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file for the drawings.")] = Path(
        "out/molecules.png"
    ),
) -> None:
    """Draw molecules, free and steered with the same seeds, and a sheet of drawings.

    Example: `python -m diffplug.demos.molecules sample --reward "logp + 5*qed" -o molecules.png`
    """
    from diffplug.demos.molecules.chemistry import chemistry
    from diffplug.demos.molecules.network import load_network
    from diffplug.demos.molecules.rewards import MoleculeReward
    from diffplug.demos.molecules.runs import compared, steerer_of, table
    from diffplug.demos.molecules.sheet import drawings
    from diffplug.files import output_file

    chemistry()
    target = output_file(out)
    judge = MoleculeReward.parse(reward)
    rule = steerer_of(steer, judge, particles, strength)
    runs = compared(load_network(model), rule, judge, groups=groups, atoms=atoms, jumps=steps, seed=seed)
    typer.echo(table(runs))
    shown = {run.title: run.molecules[:_DRAWN] for run in runs}
    footer = f"{atoms} heavy atoms, {steps} jumps, {particles} particles, strength {strength:g}, seed {seed}"
    _save(drawings(shown, judge, title=f"Molecules by {reward}", footer=footer, name=reward), target)
    typer.echo(f"{target}: the first {min(_DRAWN, groups)} groups, drawn")


@app.command()
@guarded
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the network.")],
    largest: Annotated[int, typer.Option(min=3, max=8, help="Heavy atoms of the largest molecules.")] = 6,
    updates: Annotated[int, typer.Option(min=1, help="Updates of 128 molecules.")] = 10_000,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop, saved, after this long.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Enumerate molecules, train a network on them, and save it; goes on where a run stopped.

    Example: `python -m diffplug.demos.molecules train -o runs/molecules --minutes 15`
    """
    from diffplug.demos.molecules.enumerate import enumerated
    from diffplug.demos.molecules.graphs import graphs_of, load, save
    from diffplug.demos.molecules.network import Card, save_network
    from diffplug.demos.molecules.objective import train as trained
    from diffplug.files import output_folder

    folder = output_folder(out)
    data = folder / f"molecules-{largest}.safetensors"
    if not data.exists():
        texts = [text for size, found in enumerated(largest).items() if size > 2 for text in found]
        graphs, placed = graphs_of(texts, largest)
        save(graphs, data)
        typer.echo(f"{len(placed)} of {len(texts)} molecules have a place in space")
    network = trained(
        load(data), folder, updates=updates, minutes=minutes, card=Card(largest=largest), seed=seed
    )
    save_network(network, folder)
    typer.echo(f"{folder}: model.json, model.safetensors")


def _save(image: Any, target: Path) -> None:
    from diffplug.files import atomic_path

    with atomic_path(target) as path:
        image.save(path, format="PNG")


if __name__ == "__main__":
    app()
