"""The models on which `benchmarks.solvers` searches and judges: a mixture in closed form, and pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor

from benchmarks.closed_form import ModelProblem
from benchmarks.command import opened
from benchmarks.solver_peers import PEERS, SD, steps_for
from diffplug import latents
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import fingerprint
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.problem import Errors, Floats, Problem
from diffplug.samplers.search.reference import refined
from diffplug.shapes import grade, sample_prompts
from diffplug.testing.closed_form.guided_mixture import GuidedMixture

NODES = Nodes(kind="name", name="linspace", final="sigma_min")
CLEAN = Nodes(kind="name", name="linspace", final="zero")
TAIL = 600  # noises on which no schedule that is kept may blow up


@dataclass
class Bench:
    """Three sets of pairs: to fit to, to choose by, and to judge with, which no search has seen.

    clean: the third set again, its truth without any noise left.
    """

    train: Problem
    held_out: Problem
    fresh: Problem
    clean: Problem
    weights: str = ""
    tail: Problem | None = None

    def floor(self) -> dict[str, float]:
        """How far the converged samples move with half of their evaluations: no error below means much."""
        fine = int(self.fresh.fine) // 2  # type: ignore[attr-defined]
        base = dpmpp(1, NODES, order=1, lower_order_final=False)
        return self.judged(self.fresh.final(refined(base, self.fresh.levels, fine)), self.fresh)

    def peers(self) -> list[str]:
        """The schedulers of Diffusers that can run here."""
        return list(PEERS)

    def peer(self, name: str, evaluations: int) -> dict[str, float]:
        """How a scheduler of Diffusers does on the fresh pairs."""
        final = self.sample(name, evaluations)
        return self.judged(final, self.clean if PEERS[name].clean else self.fresh)

    def ours(self, schedule: SolverSchedule) -> dict[str, float]:
        """How a schedule does on the fresh pairs."""
        return self.judged(self.fresh.final(schedule), self.fresh)

    def judged(self, final: Floats, problem: Problem) -> dict[str, float]:
        """Mean, median and 95th percentile of the squared error, and what share of it the worst tenth has.

        What is not finite counts as infinitely far. A large share says that a few pairs end somewhere else.
        """
        off = np.square(final - problem.reference).mean(axis=1)
        off = np.sort(np.where(np.isfinite(off), off, np.inf))
        worst = float(off[-max(1, len(off) // 10) :].sum() / off.sum()) if 0 < off.sum() < np.inf else 1.0
        return {**Errors(off).figures(), "worst tenth": worst}

    def sample(self, name: str, evaluations: int) -> Floats:
        """The final samples [n, d] of a scheduler of Diffusers, run by its own code."""
        raise NotImplementedError

    @contextmanager
    def searching(self) -> Iterator[None]:
        """A search runs inside."""
        yield


class MixtureBench(Bench):
    """The guided Gaussian mixture in 16 dimensions, in closed form; guidance 0 is the mixture alone."""

    def __init__(self, guidance: float, pairs: int, held_out: int, fresh: int, fine: int) -> None:
        self.toy = GuidedMixture(guidance)
        self.levels = NoiseLevels.from_scheduler(diffusers.UniPCMultistepScheduler(**SD))
        self.noise, prompts = self.toy.pairs(fresh, seed=2)
        third = (self.noise, prompts)
        sets = (self.toy.pairs(pairs, seed=1), self.toy.pairs(held_out, seed=3), third)
        problems = [self._problem(each, NODES, fine) for each in sets]
        tail = self._problem(self.toy.pairs(TAIL, seed=4), NODES, fine)
        super().__init__(*problems, clean=self._problem(third, CLEAN, fine), tail=tail)

    def _problem(self, pairs: tuple[Tensor, Tensor], nodes: Nodes, fine: int) -> ModelProblem:
        x, prompts = pairs

        def epsilon(x: Tensor, timestep: float) -> Tensor:
            level = self.levels.level(float(self.levels.sigma_of_time(timestep)))
            return (x - level.alpha * self.toy.x0(x, level.alpha, level.sigma, prompts)) / level.sigma

        return ModelProblem(epsilon, x, self.levels, nodes, fine)

    def sample(self, name: str, evaluations: int) -> Floats:
        scheduler = PEERS[name].on_levels(self.levels)
        steps_for(scheduler, evaluations)
        x = self.noise * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            out = self.fresh.epsilon(scheduler.scale_model_input(x, t), float(t))  # type: ignore[attr-defined]
            x = scheduler.step(out, t, x).prev_sample
        return x.double().numpy()


class PipelineBench(Bench):
    """A pipeline on Shapes prompts: of the search split to fit and choose, of the test split to judge.

    Figures on fresh pairs come with the share of pictures that are right in every fact. folder: for truths.
    """

    def __init__(
        self,
        model: str,
        guidance: float,
        pairs: int,
        held_out: int,
        fresh: int,
        fine: int,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.pipe = opened(model, device)
        self.prompts = sample_prompts(fresh, seed=20_000, split="test")
        sets = [(sample_prompts(n, seed=k, split="search"), k) for n, k in ((pairs, 0), (held_out, 10_000))]
        self.runs = [
            Rollouts(self.pipe, prompts, list(range(seed, seed + len(prompts))), 4, guidance)
            for prompts, seed in [*sets, (self.prompts, 20_000), (self.prompts, 20_000)]
        ]
        nodes = (NODES, NODES, NODES, CLEAN)
        super().__init__(
            *(PipelineProblem(*each, fine, folder) for each in zip(self.runs, nodes, strict=True)),
            weights=fingerprint(self.pipe),
        )

    def peers(self) -> list[str]:
        return [name for name, peer in PEERS.items() if not peer.mixture_only]

    def sample(self, name: str, evaluations: int) -> Floats:
        trials, scheduler = self.runs[2], PEERS[name].for_pipeline(self.pipe)
        trials.steps = steps_for(scheduler, evaluations)
        final = trials.final(scheduler)
        return final.reshape(len(final), -1).numpy()

    def judged(self, final: Floats, problem: Problem) -> dict[str, float]:
        return {**super().judged(final, problem), "strict": self.strict(final)}

    def strict(self, final: Floats) -> float:
        """The share of final latents whose pictures hold every fact of their prompt."""
        return float(grade(self.pictures(final), self.prompts).strict.mean())

    def pictures(self, final: Floats) -> Tensor:
        """Latents [n, d] decoded: [n, 3, 64, 64]."""
        shape = (len(final), self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
        z = torch.from_numpy(np.nan_to_num(final)).float().reshape(shape).to(self.pipe.device)
        return latents.decode(self.pipe, z, batch_size=50).cpu()

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Network outputs are remembered, and both sets counted together."""
        with self.runs[0].remembering():
            self.runs[1].network_cache = self.runs[0].network_cache
            yield
