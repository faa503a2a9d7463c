"""A model in closed form as a problem for searches: no pipeline, no pictures, exact converged samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffplug.network.cache import NetworkCache
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.problem import SQUARED, Loss, Run
from diffplug.samplers.search.reference import flat, refined, stacked, states_of
from diffplug.samplers.solver.compile import compile_schedule

__all__ = ["ModelProblem"]

Floats = npt.NDArray[np.float64]
NO_PICTURES = "a model in closed form has no pictures to judge: take 'latent-mse'"


@dataclass
class ModelProblem:
    """A model in closed form: `epsilon(x, timestep)`, its noise levels, and start noises x [n, ...] float64.

    epsilon has to treat all rows alike where parts of the problem are wanted. nodes: where the reference
    starts and ends. fine: its evaluations. loss: what fits make small.
    """

    epsilon: Callable[[Tensor, float], Tensor]
    noises: Tensor
    levels: NoiseLevels
    nodes: Nodes
    fine: int = 1000
    loss: Loss = SQUARED
    network_cache: NetworkCache = field(default_factory=NetworkCache, init=False)

    @property
    def prompts(self) -> list[str]:
        return [""] * len(self.noises)

    def pictures(self, final: Floats) -> Tensor:
        raise ValueError(NO_PICTURES)

    def part(self, begin: int, end: int) -> ModelProblem:
        part = replace(self, noises=self.noises[begin:end])
        part.network_cache = self.network_cache
        part.__dict__["reference"] = self.reference[begin:end]
        return part

    def final(self, schedule: SolverSchedule) -> Floats:
        return self.run(schedule).final

    def run(self, schedule: SolverSchedule) -> Run:
        table = compile_schedule(schedule, self.levels)
        times = self.levels.time_of_sigma(np.array(table.sigmas[:-1]))
        shown = times if schedule.time_shift is None else times + np.array(schedule.time_shift)
        data: list[Tensor] = []
        states: list[Tensor] = []

        def denoise(x: Tensor, i: int) -> Tensor:
            alpha, sigma = table.levels[i].alpha, table.levels[i].sigma
            data.append((x - sigma * self.epsilon(x, float(shown[i]))) / alpha)
            self.network_cache.evaluated += 1
            return data[-1].clone()

        final = table.run(denoise, self.noises, observe=lambda _, x: states.append(x.clone()))
        return Run(flat(final), stacked(states[: len(schedule.steps)]), stacked(data))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.noises.shape[1:])

    def predictions(self, schedule: SolverSchedule, states: Floats) -> Floats:
        sigmas = schedule.nodes.sigmas(self.levels, len(schedule.steps))[:-1]
        found = []
        for i, (sigma, t) in enumerate(zip(sigmas.tolist(), self.levels.time_of_sigma(sigmas), strict=True)):
            at = self.levels.level(sigma)
            x = torch.from_numpy(states[i]).reshape(self.noises.shape) if i else self.noises
            found.append((x - at.sigma * self.epsilon(x, float(t))) / at.alpha)
            self.network_cache.evaluated += 1
        return stacked(found)

    @cached_property
    def reference(self) -> Floats:
        base = dpmpp(1, self.nodes, order=1, lower_order_final=False)
        return self._uncounted(refined(base, self.levels, self.fine)).final

    def reference_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        fine = refined(schedule, self.levels, evaluations or self.fine)
        return states_of(self._uncounted(fine), schedule)

    def _uncounted(self, fine: SolverSchedule) -> Run:
        before, run = self.network_cache.evaluated, self.run(fine)
        self.network_cache.evaluated = before
        return run
