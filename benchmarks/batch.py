"""What a batch costs beside its pictures: throughput, machinery, reading, and what an edit keeps.

python -m benchmarks.batch                      # all parts, on the Shapes model
python -m benchmarks.batch --parts machinery    # one of throughput, machinery, reading, edits
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from PIL import Image

from diffplug.demos.batch.drivers import run, unfinished
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.manifest import Row, read_manifest
from diffplug.demos.batch.model import Model
from diffplug.demos.batch.plan import Plan, plan

STEPS, GUIDANCE = 6, 5.0


def throughput(pictures: int, rounds: int, rows: int, images: int = 1) -> dict[str, Any]:
    """Return pictures a second: one by one, a plain loop with `rows` in a call, a batch to folders, to tar.

    images: pictures of each prompt. CPU seconds, for machines on which others work too; the ways take turns,
    and ratios are medians over the rounds.
    """
    from diffplug.making.png import save_png
    from diffplug.plug import plug
    from diffplug.registry import sampler
    from diffplug.seeds import Seeds
    from diffplug.shapes import sample_prompts

    texts = sample_prompts(-(-pictures // images), seed=1, split="search")
    prompts = [text for text in texts for _ in range(images)][:pictures]
    lines = [(i, Row(prompt=text, seed=i)) for i, text in enumerate(prompts, 1)]
    wanted = plan("m", lines, settings={"sampler": "dc-solver", "steps": STEPS, "guidance": GUIDANCE})
    pipe = Model().load()

    def plain(size: int, folder: Path) -> None:
        for first in range(0, pictures, size):
            part = list(range(first, min(first + size, pictures)))
            with plug(pipe, sampler("dc-solver", pipe, STEPS), Seeds([i + 1 for i in part])):
                words = [prompts[i] for i in part]
                output = pipe(words, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
            for i, image in zip(part, output.images, strict=True):
                save_png(image, folder / f"{i}.png")

    def batch(layout: str, folder: Path) -> None:
        job = Job(folder / "out", "shapes", layout, max_rows=rows)
        job.start()
        run(job, Loaded(pipe), wanted.shards, wanted.recipes)

    ways: dict[str, Callable[[Path], None]] = {
        "one_by_one": lambda folder: plain(1, folder),
        "plain_loop": lambda folder: plain(rows, folder),
        "batch_folder": lambda folder: batch("folder", folder),
        "batch_tar": lambda folder: batch("tar", folder),
    }
    _cpu(ways["batch_folder"])  # the first calls of a process are slow
    turns = [{name: _cpu(way) for name, way in ways.items()} for _ in range(rounds)]
    speed = {name: pictures / statistics.median(turn[name] for turn in turns) for name in ways}
    ratio = lambda a, b: round(statistics.median(turn[b] / turn[a] for turn in turns), 3)  # noqa: E731
    return {
        "pictures": pictures,
        "images_a_prompt": images,
        "rows_in_a_call": rows,
        "pictures_per_cpu_second": {name: round(value, 2) for name, value in speed.items()},
        "folder_to_plain_loop": ratio("batch_folder", "plain_loop"),
        "tar_to_plain_loop": ratio("batch_tar", "plain_loop"),
        "folder_to_one_by_one": ratio("batch_folder", "one_by_one"),
    }


class Loaded:
    """A model that was loaded before."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def setup(self) -> dict[str, str]:
        """Return what a picture's settings say of the model."""
        return {"model": "shapes", "dtype": "float32"}

    def load(self, rank: int = 0) -> Any:
        """Return the pipeline."""
        return self.pipe


def _cpu(way: Callable[[Path], None]) -> float:
    """Return the CPU seconds of a way to make pictures into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = process_time()
        way(Path(folder))
        return process_time() - start


def machinery(pictures: int) -> dict[str, Any]:
    """Return milliseconds a picture without a network: encoding, writing, fsync, records, commit."""
    from diffplug.demos.batch import render
    from diffplug.recipe.batches import Batch

    wanted = plan("m", [(i, Row(prompt=f"prompt {i}")) for i in range(pictures)])
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    found: dict[str, Any] = {}
    real = render.batches

    def fake(recipe: Any, pipe: Any, prompts: Sequence[str], seeds: Any, **_: Any) -> Any:
        yield Batch(0, [image.copy() for _ in prompts], 1, [None] * len(prompts), 4.0, {})

    render.batches = fake  # type: ignore[assignment]
    try:
        for layout in ("folder", "tar"):
            with tempfile.TemporaryDirectory() as folder:
                job = Job(Path(folder), "fake", layout)
                job.start()
                start, cpu = perf_counter(), process_time()
                run(job, Loaded(None), wanted.shards, [])
                found[f"{layout}_ms"] = round((perf_counter() - start) / pictures * 1e3, 2)
                found[f"{layout}_cpu_ms"] = round((process_time() - cpu) / pictures * 1e3, 2)
                start = process_time()
                unfinished(job, wanted.shards)
                found[f"{layout}_found_again_ms"] = round((process_time() - start) / pictures * 1e3, 4)
    finally:
        render.batches = real
    return found


def reading(rows: int) -> dict[str, Any]:
    """Return CPU seconds to read and to cut a manifest, and the peak memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        path.write_text(
            "".join(f'{{"prompt": "picture {i}", "steps": 6, "guidance": 5}}\n' for i in range(rows))
        )
        start = process_time()
        for _ in read_manifest(path):
            pass
        read = process_time() - start
        start = process_time()
        found = plan(path, read_manifest(path))
        whole = process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": rows,
        "shards": len(found.shards),
        "read_s": round(read, 2),
        "read_and_cut_s": round(whole, 2),
        "peak_mib": round(peak),
    }


def edits(rows: int) -> dict[str, Any]:
    """Return the share of shards whose name survives an edit of the manifest."""
    prompts = [f"prompt {i}" for i in range(rows)]
    names = lambda found: {shard.key for shard in found.shards}  # noqa: E731

    def of(texts: Sequence[str]) -> Plan:
        return plan("m", ((i, Row.model_construct(prompt=text)) for i, text in enumerate(texts)))

    before = names(of(prompts))
    edited = list(prompts)
    for place in random.Random(1).sample(range(rows), 30):
        edited[place] += " edited"
    ways = {
        "append": [*prompts, "new"],
        "insert_at_head": ["new", *prompts],
        "delete": prompts[: rows // 2] + prompts[rows // 2 + 1 :],
        "edit_30": edited,
    }
    kept = {name: round(len(before & names(of(texts))) / len(before), 4) for name, texts in ways.items()}
    return {"rows": rows, "shards": len(before), **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ("reading", "edits", "machinery", "throughput")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--pictures", type=int, default=64, help="of the throughput")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="of a call of the throughput")
    parser.add_argument("--images", type=int, default=1, help="of each prompt of the throughput")
    asked = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "reading": lambda: reading(100_000),
        "edits": lambda: edits(60_000),
        "machinery": lambda: machinery(1_000),
        "throughput": lambda: throughput(asked.pictures, asked.rounds, asked.rows, asked.images),
    }
    for name in asked.parts:
        print(json.dumps({name: parts[name]()}))


if __name__ == "__main__":
    main()
