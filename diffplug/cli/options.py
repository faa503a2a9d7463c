"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _folder(text: str | Path) -> Path:
    if not str(text).strip():
        raise typer.BadParameter("the folder's name is empty: give one, or . for the current folder")
    return Path(text)


def schedule_file(text: str | Path) -> Path:
    """Return the path of a schedule to write; --sampler knows schedules by the end of their names."""
    path = Path(text)
    if path.suffix != ".json" and not path.is_dir():
        raise typer.BadParameter("give a name that ends in .json, by which --sampler knows a schedule")
    return path


Model = Annotated[str, typer.Option(help="shapes (embedded), a folder, or a hub id such as owner/name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, max=1000, help="Guidance scale; the pipeline's own if not given.")
]

# of searches
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, a prompt a line; the Shapes model has its own.")
]
FirstSeed = Annotated[int, typer.Option(min=0, help="Seed of the search and of the first pair.")]
ScheduleOut = Annotated[
    Path,
    typer.Option("--out", "-o", parser=schedule_file, metavar="FILE", help="JSON file to write."),
]
Levels = Annotated[str, typer.Option(help="Whose noise levels: shapes, a folder or a hub id.")]

# of pictures
Seed = Annotated[
    int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up.")
]
Images = Annotated[int, typer.Option("--images", "-n", min=1, max=10_000, help="Pictures for each prompt.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", parser=_folder, metavar="FOLDER", help="Folder for the pictures; made if missing."
    ),
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What the picture should not show.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File of prompts: a text, one in each line; a CSV or JSONL with prompt, negative_prompt, seed.",
    ),
]
Sampler = Annotated[str | None, typer.Option(help="A name from `diffplug names`, or a searched .json file.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Eta = Annotated[float | None, typer.Option(min=0, max=1, help="Noise of DDIM's steps: 0 none, 1 as in DDPM.")]
Width = Annotated[int | None, typer.Option(min=8, max=16_384, help="Width in pixels; else the model's own.")]
Height = Annotated[
    int | None, typer.Option(min=8, max=16_384, help="Height in pixels; else the model's own.")
]
Steer = Annotated[
    str | None,
    typer.Option(help="Choose among particles by a reward: fk, svdd, best-of-n, ...; see `diffplug names`."),
]
Particles = Annotated[int, typer.Option(min=1, max=4096, help="Particles for each picture.")]
Reward = Annotated[
    str,
    typer.Option(
        help="What steering asks for: a name from `diffplug names`, or a sum, `0.7*clip + 0.3*jpeg`."
    ),
]
Strength = Annotated[float | None, typer.Option(min=0, help="How much the reward counts.")]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="Further option of the steerer, or argument of the pipeline's call: `churn=1.0`."
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        min=1, max=4096, help="Pictures times particles in one call; halved by itself when memory runs out."
    ),
]

# of memory
Offload = Annotated[
    str, typer.Option(help="none; model: parts wait in host memory; sequential: layer by layer, slowest.")
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode large pictures tile by tile.")]
VaeSlicing = Annotated[bool, typer.Option("--vae-slicing", help="Decode pictures one by one.")]
