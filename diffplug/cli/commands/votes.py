"""`diffplug votes`: what people voted for on the page, counted, and as a table for trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffplug.cli.console import guarded, print_json, print_table
from diffplug.cli.options import Json
from diffplug.files import output_file

Source = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The page's folder (its -o), or its votes.jsonl.")
]
app = typer.Typer(no_args_is_help=True, help="Votes of the page: counted, and as a table for trainers.")


@app.command()
@guarded
def export(
    source: Source = Path("out"),
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help=".parquet with the pictures in it, or .jsonl with them beside."),
    ] = Path("votes.parquet"),
    json: Json = False,
) -> None:
    """Write the votes as a table that `diffplug train pso-offline` reads.

    Example: `diffplug votes export pictures -o votes.parquet`, then
    `diffplug train pso-offline --set objective.pairs=votes.parquet`
    """
    from diffplug.demos.studio.vote_files import export_votes

    output_file(out)
    count = export_votes(source, out)
    if json:
        return print_json({"votes": count, "file": str(out)})
    typer.echo(f"{count:,} votes are in {out}")
    return None


@app.command()
@guarded
def show(source: Source = Path("out"), json: Json = False) -> None:
    """Count how often each recipe won, lost and tied.

    Example: `diffplug votes show pictures`
    """
    from diffplug.demos.studio.vote_files import read_votes, tally

    votes = read_votes(source)
    rows = tally(votes)
    if json:
        return print_json({"votes": len(votes), "recipes": rows})
    columns = ["recipe", "won", "lost", "tied"]
    print_table(columns, [[str(row[name]) for name in columns] for row in rows], right=columns[1:])
    typer.echo(f"{len(votes):,} votes")
    return None
