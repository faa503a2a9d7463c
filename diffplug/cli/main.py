"""`diffplug ...`: the command line. Torch and the wings load only in the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

import diffplug
from diffplug.cli.boundary import Commands
from diffplug.cli.commands import schedule, votes
from diffplug.cli.commands.batch import batch
from diffplug.cli.commands.compare import compare
from diffplug.cli.commands.demo import demo
from diffplug.cli.commands.few_step import recipe
from diffplug.cli.commands.generate import generate
from diffplug.cli.commands.inspect import doctor, names
from diffplug.cli.commands.score import score
from diffplug.cli.commands.score_adapter import score_adapter
from diffplug.cli.commands.search import search
from diffplug.cli.commands.show import show
from diffplug.cli.commands.train import train
from diffplug.cli.commands.video import video

app = typer.Typer(
    name="diffplug",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make Diffusers pipelines faster, steered or tuned.",
)
for command in (
    generate,
    batch,
    video,
    compare,
    demo,
    search,
    train,
    score,
    score_adapter,
    show,
    recipe,
    names,
    doctor,
):
    app.command()(command)
app.add_typer(schedule.app, name="schedule")
app.add_typer(votes.app, name="votes")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error was raised; goes anywhere in the line.")
    ] = False,
) -> None:
    """Make Diffusers pipelines faster, steered or tuned."""
    if version:
        typer.echo(diffplug.__version__)
        raise typer.Exit
