"""`diffplug show`: how a picture was made, read from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, print_table
from diffplug.cli.options import Json


@guarded
def show(
    pictures: Annotated[list[Path], typer.Argument(metavar="FILE...", help="PNG files.")],
    json: Json = False,
) -> None:
    """Print the settings that made a picture, from its PNG file.

    Files of A1111 and its kin are read too. `diffplug generate --from FILE` makes the picture again.

    Example: `diffplug show out/seed-000000.png`
    """
    found = {str(path): _settings(path) for path in pictures}
    if json:
        print_json(found)
        return
    for name, (path, settings) in zip(found, zip(pictures, found.values(), strict=True), strict=True):
        print_table([name, ""], _rows(settings))
        typer.echo(f'again: diffplug generate --from "{path}"\n')


def _settings(path: Path) -> dict[str, Any]:
    from diffplug.making.picture_settings import settings_of_picture
    from diffplug.making.png import read_settings

    return read_settings(path) or settings_of_picture(path)


def _rows(settings: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Return names and values; what is nested gets names with a dot."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", f"{value:g}" if isinstance(value, float) else str(value)])
    return rows
