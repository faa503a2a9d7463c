"""What searches of a pipeline's solver have in common: how it is run, on which prompts and noises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from diffplug.network_cache import digest
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.search.problem import PipelineProblem
from diffplug.samplers.solver.scheduler import SolverScheduler
from diffplug.scheduler_plug import build, current_scheduler, world

__all__ = ["Plan", "ends_of", "parted", "text_digest"]

FIRST_SEEDS = (0, 1_000_000, 2_000_000)
"""Where the seeds of the three sets of pairs begin, counted from the search's own."""


@dataclass(frozen=True)
class Plan:
    """How the pipeline is run, whatever the schedule.

    guidance: the call's guidance_scale, None for the pipeline's own. options: further keywords of the call.
    max_rows: prompts in one call. seed: of the first pair. nodes: where converged runs start and end, in
    `fine` evaluations; cache: their folder.
    """

    pipe: Any
    guidance: float | None
    options: dict[str, Any]
    max_rows: int
    seed: int
    nodes: Nodes
    fine: int
    cache: Path | None

    def sets(self, prompts: Sequence[Sequence[str]], counts: Sequence[int]) -> list[PipelineProblem]:
        """The pairs to search on, to choose by and to judge by."""
        for name, count in zip(("pairs", "validation", "test"), counts, strict=True):
            if count < 1:
                raise ValueError(f"{name}={count}: give at least 1 pair of prompt and noise")
        found = []
        for part, count, first in zip(prompts, counts, FIRST_SEEDS, strict=True):
            words = list(islice(cycle(part), count))
            seeds = list(range(self.seed + first, self.seed + first + count))
            trials = Rollouts(self.pipe, words, seeds, 4, self.guidance, self.options, self.max_rows)
            found.append(PipelineProblem(trials, self.nodes, self.fine, self.cache))
        return found

    def told(self) -> dict[str, Any]:
        """What the schedule is for, JSON."""
        return {
            "model": fingerprint(self.pipe),
            "architecture": architecture(self.pipe),
            "pipeline": type(self.pipe).__name__,
            "guidance_scale": self.guidance,
            "grid": self.nodes.name,
            "truth_steps": self.fine,
            "options": {name: digest(value).hex()[:16] for name, value in self.options.items()},
        }


def ends_of(pipe: Any, grid: str) -> Nodes:
    """The grid whose ends are kept; refuses schedulers without ordinary noise levels."""
    build(SolverScheduler, pipe)
    flow = world(current_scheduler(pipe)) == "flow matching"
    return Nodes(kind="name", name=grid, final="zero" if flow else "sigma_min")


def parted(prompts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Prompts to search on, to choose by and to judge by: none is in two sets."""
    words = list(dict.fromkeys(prompts))
    if len(words) < 3:
        raise ValueError(
            f"{len(words)} different prompts: give at least 3, as some are searched on, some choose and some "
            "judge; sixty or more for a result that holds"
        )
    return [*words[::4], *words[3::4]], words[1::4], words[2::4]


def text_digest(prompts: Sequence[str]) -> str:
    """A hash of prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
