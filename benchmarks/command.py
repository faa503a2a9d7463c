"""What the commands of this folder have in common: how they are called, and the pipeline they run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from diffplug import load

MODELS = "shapes, or the folder of such a pipeline"


def command(module: str, *, model: str | None = None, models: str = MODELS) -> argparse.ArgumentParser:
    """A parser that is named and described after a module of this folder.

    model: the default of --model, which comes with --device; None for commands without a pipeline. models:
    what is allowed there, in words.
    """
    source = sys.modules[module]
    name = source.__spec__.name if source.__spec__ else module
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=(source.__doc__ or "").splitlines()[0]
    )
    if model is not None:
        parser.add_argument("--model", default=model, help=models)
        parser.add_argument("--device", default="cpu")
    return parser


def opened(told: argparse.Namespace) -> Any:
    """The pipeline of --model on --device, without progress bars."""
    pipe = load(told.model).to(told.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
