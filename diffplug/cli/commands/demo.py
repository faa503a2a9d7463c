"""`diffplug demo`: the page, on this machine unless others are let in with a password."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diffplug.cli import options as o
from diffplug.cli.console import guarded, until_stopped
from diffplug.cli.named_samplers import Samplers, name_samplers


@guarded
def demo(
    model: o.Model = "shapes",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the page.")] = 7860,
    pipes: Annotated[
        int, typer.Option(min=1, max=16, help="Requests that run at once; they share the weights.")
    ] = 1,
    listen: Annotated[
        str, typer.Option(help="Address to listen on; others than 127.0.0.1 need --auth.")
    ] = "127.0.0.1",
    auth: Annotated[
        str | None,
        typer.Option(help="Name of a user; the password comes from DIFFPLUG_PASSWORD, or is asked for."),
    ] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="Further name by which browsers may ask for the page.")
    ] = None,
    out: o.Out = Path("out"),
    samplers: Samplers = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Open a page in the browser: make, compare, steer, restore settings from a picture, vote.

    Pictures are kept in the folder by their ids, votes in votes.jsonl. It listens on this machine only.

    Example: `diffplug demo --pipes 2 -o pictures`
    """
    if find_spec("gradio") is None:
        raise ValueError('the page needs Gradio: pip install "diffplug[demo]"')
    from diffplug.demos.page.launch import private_environment, serve

    if listen not in ("127.0.0.1", "localhost") and auth is None:
        raise ValueError(f"--listen {listen} lets others in: add --auth NAME, and a password when asked")
    files = name_samplers(samplers)
    password = _password(auth)
    with private_environment() as folder:
        from diffplug.cli.pipeline import load_pipeline
        from diffplug.demos.batch.model import Model
        from diffplug.demos.page.page import LOOK, build
        from diffplug.demos.studio.form import Choices
        from diffplug.demos.studio.studio import Studio
        from diffplug.demos.studio.votes import Votes
        from diffplug.files import output_folder
        from diffplug.placing import device_of, dtype_of

        used = dtype_of(dtype, model, device_of(device))
        output_folder(out)
        typer.echo("loading the model ...", err=True)
        pipe = load_pipeline(model, device, dtype, [])
        pipe.set_progress_bar_config(disable=True)
        identity = Model(model, device, dtype).identity()
        choices = Choices.of(model, files)
        studio = Studio(pipe, choices, copies=pipes, folder=out, dtype=used, identity=identity)
        page = build(studio, Votes(out, studio))
        known = None if auth is None or password is None else (auth, password)
        with until_stopped("the page is closed"):
            address = serve(
                page,
                folder,
                host=listen,
                port=port,
                auth=known,
                browser=browser,
                names=hosts or (),
                wait=False,
                copies=pipes,
                look=dict(LOOK),
            )
            typer.echo(f"the page is at {address} (Ctrl-C ends it)", err=True)
            page.block_thread()


def _password(user: str | None) -> str | None:
    """Return the password of a user: from the environment, or typed."""
    if user is None:
        return None
    password = os.environ.get("DIFFPLUG_PASSWORD") or str(
        typer.prompt(f"password of {user}", hide_input=True)
    )
    if len(password) < 8:
        raise ValueError("the password has fewer than 8 characters: take a longer one")
    return password
