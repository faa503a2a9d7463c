"""Shapes: the shipped four-step student tuned by the grader, every way, and what became of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.distill.shapes import drawn
from benchmarks.preference.naive import Naive
from diffplug import rewards
from diffplug.files import atomic_write, output_folder, read_json, write_json
from diffplug.latents import decode
from diffplug.plug import plug
from diffplug.registry import TRAINERS
from diffplug.rewards.shapes import ShapesReward
from diffplug.samplers.few_step.plug import FewStep
from diffplug.seeds import Seeds
from diffplug.shapes import grade, sample_prompts
from diffplug.training.conditions import one_denoiser
from diffplug.training.job import Job
from diffplug.training.precision import autocast
from diffplug.training.preference.gauges import diversity, edge_sharpness
from diffplug.training.train import train

REWARD = "shapes + shapes:strict"
FULL = {"kind": "full", "extract": 32}
SHIPPED: dict[str, Any] = {
    "student": {"start": "shapes", "steps": 4, "name": "shapes-4-pso"},
    "objective": {"reward": REWARD, "beta": 100.0, "eta": 1.0},
    "optimizer": {"lr": 5e-5, "betas": [0.9, 0.99]},
    "tuner": FULL,
    "run": {"updates": 50, "batch": 32},
    "validation": {"sheet": 16, "count": 16, "prompts": "shapes:search"},
}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "pso": ("pso", {}),
    "pso-lora": (
        "pso",
        {"tuner": {"kind": "lora", "rank": 16, "extract": None}, "optimizer": {"lr": 1.5e-4}},
    ),
    "pso-cool": ("pso", {"optimizer": {"lr": 3e-5}, "run": {"batch": 64, "updates": 40}}),
    "pso-no-anchor": ("pso", {"objective": {"anchor": 0.0}}),
    "random": ("pso", {"objective": {"reward": f"{__file__}:coin"}}),
    "naive": ("naive-preferred", {"run": {"updates": 20}}),
    "naive-steady": (
        "naive-preferred",
        {"run": {"updates": 20}, "optimizer": {"floor": 1.0, "warmup": 1, "ema": 0.0}},
    ),
}
"""Each run: its method, and what differs from `SHIPPED`."""

if "naive-preferred" not in TRAINERS:
    TRAINERS.register("naive-preferred", "benchmarks.preference.naive:Naive")
assert issubclass(Naive, TRAINERS.get("naive-preferred"))  # noqa: S101


def coin(images: Tensor, prompts: list[str]) -> np.ndarray:
    """The same reward with a coin for each prompt that says which of its candidates wins: the control."""
    told = rewards.score(rewards.get(REWARD), images, prompts).numpy()
    return np.array(
        [v if hashlib.sha256(p.encode()).digest()[0] % 2 else -v for v, p in zip(told, prompts, strict=True)]
    )


def write_prompts(folder: Path, n: int = 3000, seed: int = 11) -> Path:
    """Write training prompts of two and three objects; those of one are right already."""
    many = sample_prompts(4 * n // 3, seed=seed, split="train")
    file = output_folder(folder) / "prompts.txt"
    atomic_write(file, "".join(f"{prompt}\n" for i, prompt in enumerate(many) if i % 4))
    return file


def tuned(name: str, folder: Path, cache: Path, seed: int = 0, minutes: float | None = None) -> float:
    """Train a run of `NAMES` and return its CPU seconds; an interrupted one goes on."""
    from diffplug.training.config import merged

    method, changes = NAMES[name]
    config = merged(SHIPPED, changes)
    lines = [f"{t}.{k}={v!r}" for t, values in config.items() for k, v in values.items() if v is not None]
    lines += [f"data.prompts={write_prompts(folder)}", f"run.seed={seed}"]
    began = time.process_time()
    train(Job.read(method, None, lines, cache=cache), folder / f"{name}-{seed}", minutes=minutes)
    return time.process_time() - began


@dataclass(frozen=True)
class Row:
    """The figures of a model on n prompts, and each picture's strict verdict for paired differences."""

    name: str
    strict: float
    error: float
    kinds: tuple[float, ...]
    score: float
    sharpness: float
    diversity: float
    right: tuple[bool, ...]


def measured(pipe: Any, name: str, student: Any, prompts: Sequence[str], eta: float) -> Row:
    """Return the row of a student at four evaluations; picture i from seed i, the same for every student."""
    call: Mapping[str, Any] = {"num_inference_steps": 4}
    made = drawn(pipe, prompts, lambda: [FewStep(student, steps=4, eta=eta)], call)
    right = np.asarray(grade(made[1], list(prompts)).strict, dtype=bool)
    score = np.asarray(ShapesReward()(made[1], list(prompts)))
    some = [prompt for prompt in prompts[:12] for _ in range(4)]
    several = drawn(pipe, some, lambda: [FewStep(student, steps=4, eta=eta)], call)[1]
    share = float(right.mean())
    return Row(
        name,
        100 * share,
        100 * math.sqrt(share * (1 - share) / len(right)),
        tuple(round(100 * float(right[i::4].mean()), 1) for i in range(4)),
        float(score.mean()),
        edge_sharpness(made[1]),
        diversity(several, 12),
        tuple(bool(v) for v in right),
    )


def paired(row: Row, start: Row) -> tuple[float, float]:
    """Return the difference of strict per cent to the start model, and its paired standard error."""
    gap = 100 * (np.asarray(row.right, dtype=float) - np.asarray(start.right, dtype=float))
    return float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))


def table(folder: Path, names: Sequence[str], n: int, pipe: Any) -> dict[str, list[Row]]:
    """Return the rows of the start model and of every finished run, without noise and with eta 1."""
    prompts = sample_prompts(n, seed=0, split="test")
    students: dict[str, Any] = {"start": "shapes"}
    students |= {name: folder / name / "student" for name in names if (folder / name / "student").exists()}
    return {
        label: [
            known(folder / "rows", pipe, name, student, prompts, eta) for name, student in students.items()
        ]
        for label, eta in (("deterministic", 0.0), ("eta 1", 1.0))
    }


def known(folder: Path, pipe: Any, name: str, student: Any, prompts: Sequence[str], eta: float) -> Row:
    """Return a row, from `folder` where it was measured before."""
    file = output_folder(folder) / f"{name}-{eta:g}-{len(prompts)}.json"
    if file.exists():
        found = read_json(file)
        return Row(**{**found, "kinds": tuple(found["kinds"]), "right": tuple(found["right"])})
    torch.manual_seed(0)
    row = measured(pipe, name, student, prompts, eta)
    write_json(file, vars(row))
    return row


def pictures(folder: Path, names: Sequence[str], seed: int, pipe: Any, n: int = 400) -> Tensor:
    """Return pictures [rows * 8, 3, h, w]: the first four test prompts that the first run gained, and the
    first four that it lost, each from its own seed; a row for the start model and for each run.

    Needs the rows of `table`.
    """
    start, tuned = (_right(folder, name, n) for name in ("start", f"{names[0]}-{seed}"))
    gained, lost = ((np.flatnonzero(a & ~b)[:4]).tolist() for a, b in ((tuned, start), (start, tuned)))
    seeds, prompts = [*gained, *lost], sample_prompts(n, seed=0, split="test")
    students: list[Any] = ["shapes", *(folder / f"{name}-{seed}" / "student" for name in names)]
    found = []
    for student in students:
        with (
            autocast(one_denoiser(pipe), torch.bfloat16),
            plug(pipe, FewStep(student, steps=4, eta=0.0), Seeds(seeds)),
            torch.no_grad(),
        ):
            latents = pipe(prompt=[prompts[i] for i in seeds], output_type="latent", num_inference_steps=4)[0]
            found.append(decode(pipe, latents.float()))
    return torch.cat(found)


def _right(folder: Path, name: str, n: int) -> np.ndarray:
    return np.asarray(read_json(folder / "rows" / f"{name}-0-{n}.json")["right"], dtype=bool)
