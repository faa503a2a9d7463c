"""How often a searched schedule blows up: three guided mixtures, 4,000 fresh noises, with and without checks.

    python -m benchmarks.rare_noises

Mixtures of Gaussians in 24 dimensions at guidance 5, 6 evaluations, 64 pairs to search on, 128 to choose by.
Prints, stage by stage, how many of the fresh noises end with a squared error above 1, where the mean is 1e-3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from unittest.mock import patch

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from benchmarks.closed_form import ModelProblem
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.search import stages
from diffplug.samplers.search.leader import Problems
from diffplug.samplers.search.problem import errors
from diffplug.samplers.search.settings import TAIL

DIMENSIONS, GUIDANCE, STEPS = 24, 5.0, 6
MIXTURES = ((8, 0, 0.8), (8, 1, 1.0), (6, 2, 0.8))  # components, seed, spread of their means
NODES = Nodes(kind="name", name="linspace", final="sigma_min")
LEVELS = NoiseLevels.from_scheduler(
    UniPCMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
)


def problem(mixture: tuple[int, int, float], n: int, seed: int) -> ModelProblem:
    """Return a mixture with n noises, each guided towards a component of its own."""
    count, model, spread = mixture
    g = torch.Generator().manual_seed(model)
    means = spread * torch.randn(count, DIMENSIONS, generator=g, dtype=torch.float64)
    variances = (0.1 + 0.3 * torch.rand(count, generator=g, dtype=torch.float64)) ** 2
    g = torch.Generator().manual_seed(seed)
    noises = torch.randn(n, DIMENSIONS, generator=g, dtype=torch.float64)
    prompts = torch.randint(0, count, (n,), generator=g)

    def epsilon(x: Tensor, timestep: float) -> Tensor:
        at = LEVELS.level(float(LEVELS.sigma_of_time(timestep)))
        total = at.alpha**2 * variances + at.sigma**2
        off = x[:, None] - at.alpha * means
        parts = means + (at.alpha * variances / total)[:, None] * off
        share = (-0.5 * (DIMENSIONS * total.log() + off.square().sum(-1) / total)).softmax(-1)
        whole = (share[..., None] * parts).sum(1)
        guided = whole + GUIDANCE * (parts[torch.arange(len(x)), prompts] - whole)
        return (x - at.alpha * guided) / at.sigma

    return ModelProblem(epsilon, noises, LEVELS, NODES, 200)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, search with and without checks, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rare_noises")
    parser.add_argument("--fresh", type=int, default=4000, help="noises to judge by")
    given = parser.parse_args(arguments)
    names = ("mixture", "checks", "stage", "kept", "amplification", "above 1", "mean error")
    print(f"| {' | '.join(names)} |")
    print(f"|{'---|' * len(names)}")
    for i, mixture in enumerate(MIXTURES):
        train, validation = problem(mixture, 64, 1), problem(mixture, 128, 2)
        fresh, tail = problem(mixture, given.fresh, 99), problem(mixture, TAIL, 7)
        for checks in (False, True):
            problems = Problems(train, validation, tail=tail if checks else None)
            with patch.object(stages, "LARGEST", stages.LARGEST if checks else math.inf):
                found = stages.run_stages(problems, STEPS, NODES)
            for each in found.stages:
                off = errors(fresh, each.schedule)
                cells = [f"{i}", "yes" if checks else "no", each.name, "yes" if each.accepted else "no"]
                cells += [f"{each.amplification:.2f}", f"{(off.of_pairs > 1).sum()}", f"{off.mean:.1e}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
