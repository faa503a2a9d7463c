"""How the command line talks: tables and JSON on the standard output, silence from the libraries below."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffplug.cli.boundary import BAD_INPUT, guarded, until_stopped
from diffplug.cli.progress import progress

__all__ = ["BAD_INPUT", "guarded", "print_json", "print_table", "progress", "until_stopped"]

_UNFOLDED = 10_000
"""Columns of what is no terminal: files and pipes get rows whole."""


def print_json(value: Any) -> None:
    """Print one JSON document on the standard output; numbers that JSON lacks (NaN, infinity) become null."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table on the standard output; the columns named in `right` are set flush right."""
    table = Table(show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=_UNFOLDED)).print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
