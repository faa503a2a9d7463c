"""A model that costs nothing, whose pictures depend on how many are made in a call, as rounding does."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffplug.demos.batch import render
from diffplug.demos.batch.drivers import run, unfinished
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.manifest import Row
from diffplug.demos.batch.plan import Plan, plan
from diffplug.demos.batch.report import write_reports
from diffplug.recipe.batches import Batch


@dataclass(frozen=True)
class FakeModel:
    """What a driver wants of a model."""

    def setup(self) -> dict[str, str]:
        return {"model": "fake", "dtype": "float32"}

    def load(self, rank: int = 0) -> Any:
        return None


def fake_batches(
    recipe: Any, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, max_rows: int, on_step: Any
) -> Iterator[Batch]:
    """Yield one batch; "poison" in a prompt raises, "full" runs out of memory above three rows."""
    if any("poison" in prompt for prompt in prompts):
        raise ValueError("latents are not finite after step 1")
    size = min(len(prompts), 3 if any("full" in prompt for prompt in prompts) else max_rows)
    for first in range(0, len(prompts), size):
        part = range(first, min(first + size, len(prompts)))
        images = [
            Image.new("RGB", (8, 8), (zlib.crc32(prompts[i].encode()) % 256, seeds[i] % 256, len(part)))
            for i in part
        ]
        yield Batch(first, images, 1, [None] * len(images), 4.0, {})


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers make their pictures by `fake_batches`."""
    monkeypatch.setattr(render, "batches", fake_batches)


def planned(prompts: Sequence[str], *, shard: int = 4, **settings: Any) -> Plan:
    """Return the plan of some prompts."""
    rows = [(i, Row(prompt=text)) for i, text in enumerate(prompts, 1)]
    return plan("manifest", rows, model="fake", settings=settings, shard=shard)


def make(folder: Path, wanted: Plan, **options: Any) -> dict[str, Any]:
    """Return the report of a run over a plan."""
    job = Job(folder, "fake", **{"max_rows": 3, **options})
    job.start()
    todo, _, before = unfinished(job, wanted.shards)
    outcomes = run(job, FakeModel(), todo, [])
    return write_reports(job, wanted, outcomes, 1.0, before)


def final_files(folder: Path) -> dict[str, bytes]:
    """Return every file that is no report and not in a folder of work, by its name."""
    passed = {"report.json", "job.json", "contact_sheet.html"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.parts and path.name not in passed
    }


def colour(data: bytes) -> Any:
    """Return the colour of a picture."""
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
