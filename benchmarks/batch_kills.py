"""What is left of a batch that is killed, shared, full, poisoned or edited: the bytes of one that was not.

python -m benchmarks.batch_kills                         # twenty kills, and everything below
python -m benchmarks.batch_kills --parts writers disk    # some of kills, writers, disk, poison, edits

Every run is a process of the command line, on a tiny pipeline. A part ends with an error where a single file
under a final name differs from the uninterrupted run, or is there twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS = 60
SETTINGS = ("--steps", "4", "--shard", "8", "--max-rows", "4")


class Bench:
    """A model, a manifest, and what an uninterrupted run makes of it."""

    def __init__(self, home: Path, seed: int) -> None:
        from diffplug.testing import tiny

        self.home, self.draw = home, random.Random(seed)
        self.model = home / "tiny"
        tiny("sd15").save_pretrained(self.model)
        self.manifest = home / "rows.jsonl"
        self.rows = [{"prompt": f"picture {i % 20}", "seed": i} for i in range(ROWS)]
        self.write(self.rows)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the manifest."""
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, out: Path, *words: str, fault: str = "") -> subprocess.Popen[bytes]:
        """Start the command. fault: Python that runs in the process before it."""
        words = (str(self.manifest), "--model", str(self.model), *SETTINGS, "-o", str(out), *words)
        head = f"import sys\nsys.argv = ['diffplug', 'batch', *{list(words)!r}]\n"
        code = f"{head}{fault}\nfrom diffplug.cli.main import app\napp()"
        return subprocess.Popen(  # noqa: S603  our own command
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, out: Path, *words: str, fault: str = "") -> tuple[int, str]:
        """Run the command to its end; return its status and what it said."""
        process = self.start(out, *words, fault=fault)
        _, error = process.communicate()
        return process.returncode, error.decode()

    def whole(self, *words: str) -> dict[str, str]:
        """Return the files of an uninterrupted run."""
        out = self.home / f"whole-{len(list(self.home.iterdir()))}"
        status, error = self.run(out, *words)
        if status:
            raise RuntimeError(error)
        return files(out)


def files(folder: Path) -> dict[str, str]:
    """Return a hash of every file of a finished shard, by its name."""
    found = [*folder.glob("shard-*/*"), *folder.glob("shard-*.tar")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def pictures(folder: Path) -> dict[str, str]:
    """Return a hash of every picture by its name alone. Raises ValueError where one is there twice."""
    found: dict[str, str] = {}
    for path in folder.glob("shard-*/*.png"):
        if path.name in found:
            raise ValueError(f"{path.name} is there twice")
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def same(found: dict[str, str], wanted: dict[str, str], what: str) -> None:
    """Raise ValueError where files differ from those of an uninterrupted run."""
    wrong = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} of {len(wanted)} files differ, as {sorted(wrong)[0]}")


def part_of(found: dict[str, str], wanted: dict[str, str], what: str) -> None:
    """Raise ValueError where a file that is there differs from that of an uninterrupted run."""
    same(found, {name: wanted.get(name, "") for name in found}, what)


def kills(bench: Bench, count: int) -> dict[str, Any]:
    """Kill one process, or two that share a folder, when so many pictures are there; three times a folder."""
    struck, left, folders = 0, [], 0
    for layout in ("folder", "tar"):
        wanted, goal = bench.whole("--layout", layout), count // 2 if layout == "folder" else count
        while struck < goal:
            out, folders = bench.home / f"killed-{folders}", folders + 1
            for _ in range(3):
                crowd = [bench.start(out, "--layout", layout) for _ in range(bench.draw.choice((1, 1, 2)))]
                alive = _wait_for(out, bench.draw.randint(made(out) + 1, ROWS), crowd)
                for one in crowd:
                    one.kill()
                    one.communicate()
                struck += alive
                left.append(made(out))
                part_of(files(out), wanted, f"kill {struck} ({layout})")
                if left[-1] >= ROWS:
                    break
            status, error = bench.run(out, "--layout", layout)
            if status:
                raise RuntimeError(error)
            same(files(out), wanted, f"after {struck} kills ({layout})")
    return {"kills": struck, "folders": folders, "pictures_at_the_kills": left, "files_that_differ": 0}


def made(out: Path) -> int:
    """Return how many pictures are in a folder, finished or not."""
    rows = sum(len(path.read_bytes().splitlines()) for path in out.glob(".index/shard-*.jsonl"))
    return rows + len(list(out.glob("shard-*/*.png"))) + len(list(out.glob(".work/*/*.png")))


def _wait_for(out: Path, pictures: int, crowd: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Wait until so many pictures are there; return whether somebody is still at work."""
    while any(one.poll() is None for one in crowd) and made(out) < pictures:
        time.sleep(0.005)
    return any(one.poll() is None for one in crowd)


def writers(bench: Bench) -> dict[str, Any]:
    """Have two commands make one folder at once."""
    wanted, out = bench.whole(), bench.home / "shared"
    both = [bench.start(out, "--json") for _ in range(2)]
    said = [json.loads(one.communicate()[0]) for one in both]
    same(files(out), wanted, "two writers")
    return {"made_by_each": [one["made"] for one in said], "rows": ROWS}


def disk(bench: Bench) -> dict[str, Any]:
    """Let writes fail beyond a size of file, then for want of room at the n-th fsync; then go on."""
    wanted, found = bench.whole(), {}
    for number in (2, 11, 37, 80):
        fault = _FULL.format(number=number)
        out = bench.home / f"full-{number}"
        status, error = bench.run(out, fault=fault)
        part_of(files(out), wanted, f"disk full at write {number}")
        found[f"write_{number}"] = [status, " ".join(error.split())[-90:]]
        status, error = bench.run(out)
        if status:
            raise RuntimeError(error)
        same(files(out), wanted, f"room again after write {number}")
    return found


_FULL = """
import os
real, count = os.fsync, [0]
def fsync(handle):
    count[0] += 1
    if count[0] >= {number}:
        raise OSError(28, "No space left on device")
    return real(handle)
os.fsync = fsync
"""


def poison(bench: Bench) -> dict[str, Any]:
    """Have one row ask a reward for what it cannot grade; the others are made, and it is recorded."""
    bench.write(
        [
            *bench.rows[:20],
            {
                "prompt": "not of this world",
                "steer": "best-of-n",
                "particles": 2,
                "reward": "shapes",
                "seed": 1,
            },
        ]
    )
    out = bench.home / "poison"
    status, _ = bench.run(out)
    report = json.loads((out / "report.json").read_text())
    if (status, report["there"], report["failed"]) != (1, 20, 1):
        raise ValueError(f"status {status}, {report['there']} there, {report['failed']} failed")
    again, _ = bench.run(out)
    bench.write(bench.rows[:20])
    healed, _ = bench.run(out)
    wanted = bench.whole()
    part_of(pictures(out), {p.split("/")[1]: h for p, h in wanted.items()}, "poison")
    bench.write(bench.rows)
    return {"status": [status, again, healed], "told": report["failures"][0]["message"][:100]}


def edits(bench: Bench) -> dict[str, Any]:
    """Kill a run, edit the manifest, go on: unedited rows keep their pictures, edited ones are made once."""
    out = bench.home / "edited"
    process = bench.start(out)
    while process.poll() is None and len(files(out)) < 12:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = pictures(out)
    rows = [dict(row) for row in bench.rows]
    for place in bench.draw.sample(range(ROWS), 5):
        rows[place]["prompt"] += " edited"
    bench.write([*rows[1:], {"prompt": "new", "seed": 7}])
    status, error = bench.run(out)
    report = json.loads((out / "report.json").read_text())
    after = pictures(out)
    if status or report["there"] != ROWS or any(after[name] != data for name, data in before.items()):
        raise ValueError(f"after an edit: {report['there']} of {ROWS} there, status {status}: {error}")
    bench.write(bench.rows)
    return {"there_at_the_kill": len(before), "made_after": report["made"], "orphans": report["orphans"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ("kills", "writers", "disk", "poison", "edits")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name, value in (("OMP_NUM_THREADS", "1"), ("PYTHONPATH", os.getcwd())):
        os.environ.setdefault(name, value)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home), asked.seed)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "kills": lambda: kills(bench, asked.kills),
            "writers": lambda: writers(bench),
            "disk": lambda: disk(bench),
            "poison": lambda: poison(bench),
            "edits": lambda: edits(bench),
        }
        for name in asked.parts:
            start = time.monotonic()
            print(json.dumps({name: parts[name](), "seconds": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    main()
