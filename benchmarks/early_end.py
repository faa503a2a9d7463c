"""Best of n that ends early, by guidance and solver, on Shapes prompts: bars of quality, draws and seconds.

    python -m benchmarks.early_end --prompts 100 --pools early-end        # resumable; ten minutes of a core
    python -m benchmarks.early_end --pools early-end --json benchmarks/results/early_end.json

A pool holds, for every prompt, the scores of its first draws, each from its own seed: draw j of a prompt is
what `BestOfN` draws in slot j, however many it draws. So one pool tells the best of every n, and where an
early end would have stopped. Strict: every fact of the prompt holds, which is a score of 1. Test prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.command import command, opened
from diffplug.files import output_folder, read_json, write_json

CHUNK = 10


@dataclass(frozen=True)
class Pool:
    """One way of drawing: prompts of a kind, guidance, a solver, and how many draws of each prompt."""

    kind: str
    guidance: float
    solver: str
    draws: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.kind}-{self.solver}-g{self.guidance:g}"


POOLS = (
    Pool("three", 1.0, "ddim10", 16),
    Pool("three", 2.0, "ddim10", 8),
    Pool("three", 5.0, "ddim10", 8),
    Pool("mixed", 5.0, "ddim10", 8),
    Pool("mixed", 2.0, "ddim10", 8),
    Pool("three", 1.0, "student4", 24),
)


def plugs(pool: Pool) -> tuple[list[Any], dict[str, Any]]:
    """Return what a pool plugs in, and the arguments of its calls."""
    from diffusers import DDIMScheduler

    from diffplug.samplers import FewStep

    if pool.solver == "student4":
        return [FewStep("shapes", steps=4)], {}
    return [DDIMScheduler], {"num_inference_steps": 10, "guidance_scale": pool.guidance}


def drawn(pipe: Any, pool: Pool, prompts: Sequence[str], first: int) -> dict[str, Any]:
    """Return scores `[prompts, draws]`, seconds a draw, and network rows a draw."""
    from diffplug.plug import plug
    from diffplug.seeds import Seeds
    from diffplug.steering import BestOfN

    steerer = BestOfN("shapes", particles=pool.draws, returns="all")
    pieces, arguments = plugs(pool)
    with plug(pipe, *pieces, Seeds([first + i for i in range(len(prompts))]), steerer):
        pipe(list(prompts), output_type="pt", **arguments)
    report = steerer.report
    assert report is not None  # noqa: S101
    count = len(prompts) * pool.draws
    return {
        "scores": report.final_rewards.tolist(),
        "network": report.network_seconds / count,
        "decoding": report.decode_seconds / count,
        "reward": report.reward_seconds / count,
        "total": report.total_seconds / count,
        "rows": report.network_rows / count,
    }


def fill(folder: Path, prompts: int, pools: Sequence[Pool], device: str) -> None:
    """Draw what the folder does not hold yet, a chunk of prompts of every pool before the next chunk."""
    from diffplug.shapes import sample_prompts

    pipe = opened("shapes", device)
    output_folder(folder)
    for first in range(0, prompts, CHUNK):
        for pool in pools:
            path = folder / f"{pool.name}-{first:04d}.json"
            if path.exists():
                continue
            texts = sample_prompts(prompts, seed=0, kind=pool.kind, split="test")[first : first + CHUNK]
            write_json(path, drawn(pipe, pool, texts, first))
            print(path.name, flush=True)


def clock(folder: Path, pools: Sequence[Pool], device: str, rounds: int = 3) -> None:
    """Write the CPU seconds a draw of every pool, in turn and in one process: the least of some rounds."""
    from diffplug.shapes import sample_prompts

    path, pipe = folder / "clock.json", opened("shapes", device)
    found: dict[str, float] = {}
    for _ in range(rounds):
        for pool in pools:
            texts = sample_prompts(2, seed=0, kind=pool.kind, split="test")
            start = process_time()
            drawn(pipe, replace(pool, draws=8), texts, 0)
            found[pool.name] = min(found.get(pool.name, 1e9), (process_time() - start) / 16)
    write_json(path, found)


@dataclass(frozen=True)
class Held:
    """What a folder holds of a pool: scores `[P, n]` and seconds a draw."""

    pool: Pool
    scores: np.ndarray[Any, Any]
    seconds: float
    rows: float

    @property
    def right(self) -> np.ndarray[Any, Any]:
        """Return which draws are right in every fact."""
        return self.scores >= 1.0

    def best(self, n: int) -> np.ndarray[Any, Any]:
        """Return whether the best of n draws is right, by prompt: the mean over blocks of n of the pool."""
        blocks = self.right[:, : self.right.shape[1] // n * n].reshape(len(self.scores), -1, n)
        return blocks.any(-1).mean(-1)

    def stopped(self, cap: int, batch: int = 1) -> np.ndarray[Any, Any]:
        """Return how many draws an early end needs at `enough` = 1, by prompt: a mean over blocks of cap."""
        blocks = self.right[:, : self.right.shape[1] // cap * cap].reshape(len(self.scores), -1, cap)
        first = np.where(blocks.any(-1), blocks.argmax(-1) + 1, cap)
        return np.minimum(-(-first // batch) * batch, cap).mean(-1)


def held(folder: Path, pools: Sequence[Pool] = POOLS) -> Iterator[Held]:
    """Return what there is of each pool."""
    for pool in pools:
        parts = [read_json(path) for path in sorted(folder.glob(f"{pool.name}-*.json"))]
        if parts:
            scores = np.concatenate([np.asarray(part["scores"]) for part in parts])
            seconds = float(read_json(folder / "clock.json")[pool.name])
            yield Held(pool, scores, seconds, float(parts[0]["rows"]))


def with_error(x: np.ndarray[Any, Any]) -> list[float]:
    """Return the mean over prompts and its standard error."""
    return [float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)]


def summary(found: Sequence[Held]) -> dict[str, Any]:
    """Return, by pool, the best of n, draws and gain of an early end, and seconds."""
    out: dict[str, Any] = {}
    for one in found:
        draws = one.scores.shape[1]
        out[one.pool.name] = {
            "prompts": len(one.scores),
            "best": {n: with_error(one.best(n)) for n in (1, 2, 4, 8, 16, 24) if n <= draws},
            "draws": {
                f"cap {cap}, batch {batch}": with_error(one.stopped(cap, batch))
                for cap in (8, 16)
                for batch in (1, 2, 4)
                if cap <= draws
            },
            "CPU seconds a draw": one.seconds,
            "rows a draw": one.rows,
        }
    return out


def equal_seconds(found: Sequence[Held]) -> list[dict[str, Any]]:
    """Return pools beside ten guided steps at the seconds of the latter's best of 1, 2, 4 and 8."""
    by_name = {one.pool.name: one for one in found}
    guided = by_name.get("three-ddim10-g5")
    rows = []
    for n in (1, 2, 4, 8) if guided else ():
        for name in ("three-student4-g1", "three-ddim10-g1", "three-ddim10-g2"):
            other = by_name.get(name)
            if guided is None or other is None:
                continue
            m = max(1, round(n * guided.seconds / other.seconds))
            if m <= other.scores.shape[1]:
                p = min(len(guided.scores), len(other.scores))
                gain = other.best(m)[:p] - guided.best(n)[:p]
                rows.append({"guided": n, "other": name, "draws": m, "gain": with_error(gain)})
    return rows


def main() -> None:
    """Fill the pools if asked, and print the tables."""
    parser = command(__name__, model="shapes")
    parser.add_argument("--pools", type=Path, default=Path("runs/early-end"), help="folder of the draws")
    parser.add_argument("--prompts", type=int, default=0, help="draw for so many prompts first")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    if given.prompts:
        fill(given.pools, given.prompts, POOLS, given.device)
    if not (given.pools / "clock.json").exists():
        clock(given.pools, POOLS, given.device)
    found = list(held(given.pools))
    figures = {"pools": summary(found), "equal seconds, three objects": equal_seconds(found)}
    if given.json:
        write_json(given.json, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
