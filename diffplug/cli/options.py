"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="shapes (embedded), a folder, or a hub id such as owner/name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; the pipeline's own if not given.")
]

# of searches
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, a prompt a line; the Shapes model has its own.")
]
FirstSeed = Annotated[int, typer.Option(min=0, help="Seed of the search and of the first pair.")]
ScheduleOut = Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")]
Levels = Annotated[str, typer.Option(help="Whose noise levels: shapes, a folder or a hub id.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up.")
]
Images = Annotated[int, typer.Option("--images", "-n", min=1, max=10_000, help="Pictures for each prompt.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if missing.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What the picture should not show.")]
