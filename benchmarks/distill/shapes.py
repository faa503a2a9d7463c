"""Students of the Shapes model against its solvers: right pictures, fidelity to the teacher, sharpness."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional as F

from diffplug.latents import decode
from diffplug.plug import plug
from diffplug.samplers.few_step.plug import FewStep
from diffplug.seeds import Seeds
from diffplug.shapes import grade, sample_prompts
from diffplug.training.conditions import one_denoiser
from diffplug.training.precision import autocast
from diffplug.watch import quiet

GUIDANCE = 5.0
STOCK: dict[str, Any] = {
    "DDIM": DDIMScheduler,
    "DPM++2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}


@dataclass(frozen=True)
class Row:
    """The figures of one sampler on n prompts; `rows` of the network for each picture."""

    name: str
    rows: int
    strict: float
    strict_error: float
    score: float
    score_error: float
    kinds: tuple[float, ...]
    rmse: float
    edge: float
    seconds: float


@dataclass(frozen=True)
class Test:
    """The prompts, the teacher's end points [n, ...] from their seeds, and the sharpness of its edges."""

    prompts: list[str]
    ends: Tensor
    edge: float


def drawn(
    pipe: Any, prompts: Sequence[str], plugs: Callable[[], Sequence[Any]], call: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Return latents, pictures, and CPU seconds; picture i from seed i."""
    began, parts = time.process_time(), []
    with autocast(one_denoiser(pipe), torch.bfloat16), quiet(pipe), torch.no_grad():
        for begin in range(0, len(prompts), 50):
            part = slice(begin, begin + 50)
            seeds = list(range(begin, begin + len(prompts[part])))
            with plug(pipe, *plugs(), Seeds(seeds)):
                parts.append(pipe(prompt=list(prompts[part]), output_type="latent", **call)[0])
        latents = torch.cat(parts).float()
        seconds = time.process_time() - began
        return latents, decode(pipe, latents, batch_size=50), seconds


def sharpness(images: Tensor) -> float:
    """Return the mean |Laplacian| at edge pixels: those whose 5x5 neighbourhood spans more than .1.

    Taken over all pixels it would count objects.
    """
    grey = images.mean(1, keepdim=True)
    span = F.max_pool2d(grey, 5, 1, 2) + F.max_pool2d(-grey, 5, 1, 2)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    bend = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel).abs()
    return float(bend[span > 0.1].mean())


def row(name: str, rows: int, made: tuple[Tensor, Tensor, float], test: Test) -> Row:
    """Return the figures of latents and pictures."""
    latents, images, seconds = made
    grades = grade(images, test.prompts)
    strict, score = np.asarray(grades.strict, dtype=float), np.asarray(grades.score, dtype=float)
    n = len(strict)
    return Row(
        name,
        rows,
        100 * strict.mean(),
        100 * math.sqrt(strict.mean() * (1 - strict.mean()) / n),
        score.mean(),
        score.std(ddof=1) / math.sqrt(n),
        tuple(round(100 * strict[i::4].mean(), 1) for i in range(4)),
        float((latents - test.ends).square().mean().sqrt()),
        sharpness(images) / test.edge,
        seconds,
    )


def prepared(pipe: Any, n: int) -> tuple[Test, Row]:
    """Return the test of n prompts, a quarter of each kind, and the teacher's row: DDIM 20, guided."""
    prompts = sample_prompts(n, seed=0, split="test")
    made = drawn(
        pipe, prompts, lambda: [stock(pipe, "DDIM")], {"num_inference_steps": 20, "guidance_scale": GUIDANCE}
    )
    test = Test(prompts, made[0], sharpness(made[1]))
    return test, row("DDIM 20, guided (teacher)", 40, made, test)


def stock(pipe: Any, name: str) -> Any:
    """Return a stock solver on the trailing grid."""
    return STOCK[name].from_config(pipe.scheduler.config, timestep_spacing="trailing")


def of_solver(pipe: Any, name: str, steps: int, test: Test) -> Row:
    """Return the row of a stock solver with guidance, twice the network's rows."""
    call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    return row(
        f"{name} {steps}, guided",
        2 * steps,
        drawn(pipe, test.prompts, lambda: [stock(pipe, name)], call),
        test,
    )


def of_searched(pipe: Any, steps: int, test: Test) -> Row:
    """Return the row of the searched solver that ships."""
    from diffplug.samplers import Solver

    call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    made = drawn(pipe, test.prompts, lambda: [Solver("shapes", solver="unipc")], call)
    return row(f"searched solver {steps}, guided", 2 * steps, made, test)


def of_student(pipe: Any, name: Any, steps: int, test: Test, eta: float = 0.0) -> Row:
    """Return the row of a student, without guidance."""
    made = drawn(
        pipe, test.prompts, lambda: [FewStep(name, steps=steps, eta=eta)], {"num_inference_steps": steps}
    )
    return row(f"student {steps}{', eta 1' if eta else ''}", steps, made, test)
