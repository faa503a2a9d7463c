"""What the commands of this folder have in common: how they are called, and the pipeline they run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

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


def opened(model: str, device: str) -> Any:
    """The pipeline of a model on a device, without progress bars; its weights where a CPU is fastest.

    Channels last save a fifth of the Shapes U-Net's seconds on a core with AVX2, for the same pictures up to
    rounding.
    """
    pipe = load(model).to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe
