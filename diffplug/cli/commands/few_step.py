"""What the command line says of few-step checkpoints: the table of recipes, one recipe, one on a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, print_table
from diffplug.cli.options import Json

FewStepName = Annotated[
    str | None,
    typer.Option("--few-step", help="Few-step checkpoint on the model, by name: weights and guidance of it."),
]
Catalogue = Annotated[
    Path | None, typer.Option(help="A file of rows of your own, or SD.Next's reference-distilled.json.")
]


@guarded
def recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name, as in `diffplug names --few-step`.")],
    family: Annotated[
        str | None, typer.Option(help="Family, where a name has several: sd15, sdxl, ...")
    ] = None,
    catalogue: Catalogue = None,
    json: Json = False,
) -> None:
    """Print everything that a few-step checkpoint needs, and the plain Diffusers code that does it.

    Example: `diffplug recipe hyper-sd@4 --family sdxl`
    """
    for row, steps in _rows_called(name, family, catalogue):
        if json:
            print_json(row.to_json())
            continue
        facts = [
            [key, _told(value)] for key, value in row.to_json().items() if key not in ("format", "version")
        ]
        print_table([row.name, ""], facts)
        if row.refused:
            typer.echo(f"\nNot to be touched: {row.refused}\n")
            continue
        from diffplug.samplers.few_step.code import plain_code

        typer.echo(plain_code(row, steps))


def print_few_step_names(json: bool) -> None:
    """Print the table of all recipes: names, family, steps, guidance, licence, verified or not."""
    from diffplug.samplers.few_step.lookup import all_rows

    rows = all_rows()
    if json:
        print_json([row.to_json() for row in rows])
        return
    columns = ["name", "also", "family", "steps", "guidance", "licence", "verified"]
    typer.echo(_lines([columns, *(_cells(row) for row in rows)]))
    typer.echo(
        "`diffplug recipe NAME` prints all of one; --sampler NAME@STEPS, or diffplug.apply, puts it on."
    )


def with_few_step(pipe: Any, name: str | None, guidance: float | None) -> float | None:
    """Put weights and guidance of a checkpoint on a pipeline for good; return the guidance to search with."""
    if name is None:
        return guidance
    from diffplug.plug import plug
    from diffplug.samplers.few_step.plug import FewStep

    few = FewStep(name, schedule=False)
    plug(pipe, few)
    row = few.row_for(pipe)
    return 0.0 if guidance is None and row.guidance == "off" else guidance


def _rows_called(name: str, family: str | None, catalogue: Path | None) -> list[tuple[Any, int | None]]:
    """Return the rows that a name means, one for each family unless one is asked for."""
    from diffplug.samplers.few_step import lookup

    if Path(name).exists():
        from diffplug.samplers.few_step.catalogue import Row

        return [(Row.load(name), None)]
    rows = lookup.all_rows(catalogue)
    plain, steps = lookup.split(name, rows)
    called = [row for row in rows if plain in (row.name, *row.aliases) and family in (None, row.family)]
    if family is not None and not called:
        lookup.row_for(plain, family, steps, rows)  # raises, with the families that there are
    fitting = [row for row in called if steps is None or steps in row.steps]
    if not fitting:
        lookup.row_for(plain, called[0].family, steps, rows)  # raises, with the nearest
    first = {row.family: row for row in reversed(fitting)}  # the one that a pipeline of the family gets
    return [(row, steps) for row in fitting if first[row.family] is row]


def _lines(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, a line each: a table of boxes would break its lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cells(row: Any) -> list[str]:
    steps = f"{row.steps[0]}-{row.steps[-1]}" if len(row.steps) > 3 else ", ".join(map(str, row.steps))
    scale = "" if row.guidance_scale is None else f" {row.guidance_scale:g}"
    mark = "not to be touched" if row.refused else "yes" if row.verified else "no"
    return [row.name, ", ".join(row.aliases), row.family, steps, row.guidance + scale, row.licence, mark]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_told(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_told(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
