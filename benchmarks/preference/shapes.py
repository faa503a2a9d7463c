"""Shapes: the shipped four-step student tuned by the grader, every way, and what became of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.distill.shapes import GUIDANCE, drawn
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
from diffplug.training.noise_path import NoisePath
from diffplug.training.precision import autocast
from diffplug.training.preference.gauges import diversity, edge_sharpness
from diffplug.training.student import Sampling
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
MATCHING: dict[str, Any] = {  # the teacher's distribution; its objective has no reward of its own
    "objective": {"reward": None, "beta": None, "eta": None},
    "optimizer": {"lr": 3e-5},
    "run": {"updates": 100, "batch": 32},
}
GRADIENT: dict[str, Any] = {"reward": "shapes-clip", "beta": None, "eta": None}  # of a reward that has one
SPO: dict[str, Any] = {
    "student": {"start": None, "steps": 20, "guidance": GUIDANCE, "name": "shapes-20-spo"},
    "objective": {"guidance": GUIDANCE, "scale": 4.0, "clip": "none", "gauges.every": 0},
    "optimizer": {"lr": 8e-5},
    "run": {"updates": 30, "batch": 8, "save_every": 5},
}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "pso": ("pso", {}),
    "pso-lora": (
        "pso",
        {"tuner": {"kind": "lora", "rank": 16, "extract": None}, "optimizer": {"lr": 1.5e-4}},
    ),
    "pso-lora-hot": (
        "pso",
        {"tuner": {"kind": "lora", "rank": 16, "extract": None}, "optimizer": {"lr": 5e-4}},
    ),
    "pso-cool": ("pso", {"optimizer": {"lr": 3e-5}, "run": {"batch": 64, "updates": 40}}),
    "pso-wide": ("pso", {"objective": {"candidates": 4}, "run": {"updates": 80}}),
    "pso-large": ("pso", {"optimizer": {"lr": 7e-5}, "run": {"batch": 256, "updates": 60}}),
    "pso-no-anchor": ("pso", {"objective": {"anchor": 0.0}}),
    "pso-clip": ("pso", {"objective": {"reward": "shapes-clip"}}),
    "random": ("pso", {"objective": {"reward": f"{__file__}:coin"}}),
    "spo": ("spo", SPO),
    "spo-cool": ("spo", {**SPO, "optimizer": {"lr": 1e-5}}),
    "refl": (
        "draft",
        {"objective": GRADIENT, "optimizer": {"lr": 2e-5}, "run": {"updates": 40, "batch": 16}},
    ),
    "tdm": ("tdm", MATCHING),
    "tilted": ("tilted", {**MATCHING, "objective": GRADIENT}),
    "tilted-strong": ("tilted", {**MATCHING, "objective": {**GRADIENT, "tilt": 1.0}}),
    "naive": ("naive-preferred", {"run": {"updates": 20}}),
    "naive-steady": (
        "naive-preferred",
        {"run": {"updates": 20}, "optimizer": {"floor": 1.0, "warmup": 1, "ema": 0.0}},
    ),
}
"""Each run: its method, and what differs from `SHIPPED`. `spo` tunes the model of many steps; `tdm` is the
control of `tilted`."""
MANY = ("spo", "spo-cool")
SHIPS = {"pso-0": "shapes-pso"}
"""Runs whose student comes with the package: it is taken where the run itself is not there."""

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


Plugs = Callable[[], Sequence[Any]]


def measured(pipe: Any, name: str, plugs: Plugs, prompts: Sequence[str], call: Mapping[str, Any]) -> Row:
    """Return the row of a way of drawing; picture i from seed i, the same for every way."""
    made = drawn(pipe, prompts, plugs, call)
    right = np.asarray(grade(made[1], list(prompts)).strict, dtype=bool)
    score = np.asarray(ShapesReward()(made[1], list(prompts)))
    some = [prompt for prompt in prompts[:12] for _ in range(4)]
    several = drawn(pipe, some, plugs, call)[1]
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
    """Return the rows of the start model and of every finished run, without noise and with eta 1; those of
    many steps against the model of many steps."""
    finished = {name: folder / name / "student" for name in names}
    there = {
        name: student if student.exists() else SHIPS[name]
        for name, student in finished.items()
        if student.exists() or name in SHIPS
    }
    many = [name for name in there if name.rpartition("-")[0] in MANY]
    groups = {"deterministic": (4, 0.0, "shapes"), "eta 1": (4, 1.0, "shapes")}
    if many:
        groups |= {"20 steps": (20, 0.0, None), "20 steps, eta 1": (20, 1.0, None)}
    found = {}
    for label, (steps, eta, start) in groups.items():
        some = [name for name in there if (name in many) == (start is None)]
        students = {"start": start, **{name: there[name] for name in some}}
        found[label] = [
            known(folder / "rows", pipe, name, student, n, eta, steps) for name, student in students.items()
        ]
    return found


def known(folder: Path, pipe: Any, name: str, student: Any, n: int, eta: float, steps: int) -> Row:
    """Return a row, from `folder` where it was measured before."""
    tag = "" if steps == 4 else f"-{steps}"
    file = output_folder(folder) / f"{name}-{eta:g}-{n}{tag}.json"
    if file.exists():
        found = read_json(file)
        return Row(**{**found, "kinds": tuple(found["kinds"]), "right": tuple(found["right"])})
    torch.manual_seed(0)
    call: dict[str, Any] = {"num_inference_steps": steps}
    if student is None:
        call |= {"guidance_scale": GUIDANCE, "eta": eta}
        scheduler = Sampling(NoisePath.of(pipe.scheduler), (steps,)).built(pipe)
        plugs: Plugs = lambda: [scheduler]  # noqa: E731
    else:
        plugs = lambda: [FewStep(student, steps=steps, eta=eta)]  # noqa: E731
    row = measured(pipe, name, plugs, sample_prompts(n, seed=0, split="test"), call)
    write_json(file, vars(row))
    return row


def over_seeds(rows: Sequence[Row]) -> dict[str, tuple[float, float, int]]:
    """Return the mean gain of each method over its seeds, its standard error, and the number of seeds.

    rows: the start model's first. The error is of the mean over prompts of the gain over seeds, so that it
    knows of the prompts and of what the seeds differ in.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows[1:]:
        groups.setdefault(row.name.rpartition("-")[0], []).append(row)
    found = {}
    for name, some in groups.items():
        if len(some) > 1:
            gains = [paired(row, rows[0])[0] for row in some]
            right = np.mean([row.right for row in some], axis=0) - np.asarray(rows[0].right, dtype=float)
            prompts = 100 * right.std(ddof=1) / math.sqrt(len(right))
            seeds = np.std(gains, ddof=1) / math.sqrt(len(gains))
            found[name] = (float(np.mean(gains)), float(math.hypot(prompts, seeds)), len(some))
    return found


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
