"""How the command line talks: one line for an error, tables, and progress on the error stream."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["BAD_INPUT", "guarded", "hush", "print_json", "print_table", "progress", "until_stopped"]

BAD_INPUT = 2
"""Exit status for anything that another input would cure."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """`command`, with bad input, refused files and missing packages told in one line, not a traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with _warnings_in_a_line():
                return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            _fail(f"{error}. `diffplug doctor` tells what is missing and how to get it.")
        except (ValueError, OSError) as error:
            _fail(str(error) or type(error).__name__)

    return wrapper  # type: ignore[return-value]


@contextmanager
def until_stopped(how_to_go_on: str) -> Iterator[None]:
    """A block in which Ctrl-C ends the command with this line and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped: {how_to_go_on}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def hush() -> None:
    """Turns off the progress bars and notices of the libraries below, for this process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def print_json(value: Any) -> None:
    """One JSON document on the standard output; numbers that JSON lacks (NaN, infinity) become null."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on the standard output; the columns named in `right` are set flush right."""
    table = Table(show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


@contextmanager
def progress(
    tasks: Sequence[tuple[str, int]], *, disable: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A function `advance(task, n)` that moves one of the named bars, drawn on the error stream."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=disable) as bars:
        ids = [bars.add_task(name, total=total, start=False) for name, total in tasks]

        def advance(task: int, n: int) -> None:
            bars.start_task(ids[task])
            bars.advance(ids[task], n)

        if ids:
            bars.start_task(ids[0])
        yield advance


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """UserWarnings appear as `warning: ...` on the error stream, without file and line."""
    with warnings.catch_warnings():

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            typer.secho(f"warning: {message}", fg="yellow", err=True)

        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _fail(message: str) -> None:
    typer.secho(f"error: {' '.join(message.split())}", fg="red", err=True)
    raise typer.Exit(BAD_INPUT)
