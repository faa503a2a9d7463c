"""What a search minimises: the distance of a solver's final samples from the converged ones, pair by pair."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffplug.latents import decode, decoder_of
from diffplug.network_cache import NetworkCache
from diffplug.noise import families as noise
from diffplug.rollout import Rollouts, Trajectory
from diffplug.samplers.library import book_to_config
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.loss import SQUARED, Loss
from diffplug.samplers.search.reference import truth
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.scheduler import SolverScheduler
from diffplug.scheduler_plug import build

__all__ = ["Errors", "ModelProblem", "PipelineProblem", "Problem", "Run", "errors", "refined"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A run of n pairs, flattened to d numbers each, float64.

    final: [n, d]. states: [N, n, d], the (corrected) state that each step starts from. data: [N, n, d], the
    data predictions before any compensation.
    """

    final: Floats
    states: Floats
    data: Floats


class Problem(Protocol):
    """n pairs of start noise and prompt, with the samples that a converged solver reaches from them."""

    levels: NoiseLevels
    loss: Loss
    """What searches make small of the errors of pairs."""

    @property
    def memo(self) -> NetworkCache:
        """Counts the network evaluations so far, each over all pairs; problems of one search may share it."""

    def final(self, schedule: SolverSchedule) -> Floats:
        """The final samples [n, d] of a schedule."""

    def run(self, schedule: SolverSchedule) -> Run:
        """A run of a schedule, with what happened on the way."""

    @property
    def truth(self) -> Floats:
        """The converged final samples [n, d]."""

    def truth_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        """The converged states [N + 1, n, d] at the nodes of a schedule, from so many evaluations."""

    def predictions(self, schedule: SolverSchedule, states: Floats) -> Floats:
        """Data predictions [N, n, d] at given states [N, n, d]; the first ones are those of the start."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample, before it is flattened to d numbers; known once something was run."""

    def part(self, begin: int, end: int) -> Problem:
        """The same problem on the pairs begin ... end - 1; their truth is not computed again."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of every pair; empty ones where there are none."""

    def pictures(self, final: Floats) -> Tensor:
        """The pictures [n, 3, h, w] of final samples, float32 in [0, 1]; ValueError where there are none."""


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of the final samples, pair by pair: [n]; `loss` is what a search makes of them."""

    of_pairs: Floats
    loss: Loss = SQUARED

    @property
    def mean(self) -> float:
        return float(self.of_pairs.mean())

    @property
    def p95(self) -> float:
        return float(np.quantile(self.of_pairs, 0.95))

    @property
    def median(self) -> float:
        return float(np.median(self.of_pairs))

    @property
    def mean_loss(self) -> float:
        """What a search compares; the mean where the loss is the squared error."""
        return float(self.loss(self.of_pairs).mean())

    def told(self) -> dict[str, float]:
        """The figures, ready for JSON."""
        return {name: getattr(self, name) for name in ("mean", "median", "p95", "mean_loss")}


def errors(problem: Problem, schedule: SolverSchedule) -> Errors:
    """How far a schedule ends from the truth; infinite where it leaves the finite numbers."""
    off = np.square(problem.final(schedule) - problem.truth).mean(axis=1)
    return Errors(np.where(np.isfinite(off), off, np.inf), problem.loss)


def refined(
    schedule: SolverSchedule, levels: NoiseLevels, evaluations: int, order: int = 3
) -> SolverSchedule:
    """DPM-Solver++ over the schedule's own nodes and as many more, evenly between them in time.

    The nodes of `schedule` are every m-th of the result, m = ceil(evaluations / steps).
    """
    nodes = schedule.nodes.sigmas(levels, len(schedule.steps))
    times = np.append(levels.time_of_sigma(nodes[:-1]), 0.0)
    if nodes[-1] > 0:
        times[-1] = levels.time_of_sigma(nodes[-1:])[0]
    m = -(-evaluations // len(schedule.steps))
    fine = np.concatenate([np.linspace(a, b, m, endpoint=False) for a, b in pairwise(times)])
    sigmas = np.append(fine / levels.train_steps if levels.flow else levels.sigma_of_time(fine), nodes[-1])
    sigmas[::m] = nodes
    return dpmpp(
        len(sigmas) - 1,
        Nodes(kind="sigmas", values=tuple(sigmas.tolist())),
        order=order,
        true_third=order == 3,
        lower_order_final=False,
    )


FINE = 200  # evaluations of a converged run; with fewer, guidance throws the third order far off
NO_PICTURES = "a model in closed form has no pictures to judge: take 'latent-mse'"


@dataclass
class ModelProblem:
    """A model in closed form: `epsilon(x, timestep)`, its noise levels, and start noises x [n, ...] float64.

    epsilon has to treat all rows alike where parts of the problem are wanted. nodes: where the truth starts
    and ends. fine: evaluations of the truth. loss: what a search makes small.
    """

    epsilon: Callable[[Tensor, float], Tensor]
    noises: Tensor
    levels: NoiseLevels
    nodes: Nodes
    fine: int = 1000
    loss: Loss = SQUARED
    memo: NetworkCache = field(default_factory=NetworkCache, init=False)

    @property
    def prompts(self) -> list[str]:
        return [""] * len(self.noises)

    def pictures(self, final: Floats) -> Tensor:
        raise ValueError(NO_PICTURES)

    def part(self, begin: int, end: int) -> ModelProblem:
        part = replace(self, noises=self.noises[begin:end])
        part.memo = self.memo
        part.__dict__["truth"] = self.truth[begin:end]
        return part

    def final(self, schedule: SolverSchedule) -> Floats:
        return self.run(schedule).final

    def run(self, schedule: SolverSchedule) -> Run:
        table = compile_schedule(schedule, self.levels)
        times = self.levels.time_of_sigma(np.array(table.sigmas[:-1]))
        told = times if schedule.time_shift is None else times + np.array(schedule.time_shift)
        data: list[Tensor] = []
        states: list[Tensor] = []

        def denoise(x: Tensor, i: int) -> Tensor:
            alpha, sigma = table.levels[i].alpha, table.levels[i].sigma
            data.append((x - sigma * self.epsilon(x, float(told[i]))) / alpha)
            self.memo.evaluated += 1
            return data[-1].clone()

        final = table.run(denoise, self.noises, observe=lambda _, x: states.append(x.clone()))
        return Run(_flat(final), _stacked(states[: len(schedule.steps)]), _stacked(data))

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
            self.memo.evaluated += 1
        return _stacked(found)

    @cached_property
    def truth(self) -> Floats:
        base = dpmpp(1, self.nodes, order=1, lower_order_final=False)
        return self._uncounted(refined(base, self.levels, self.fine)).final

    def truth_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        fine = refined(schedule, self.levels, evaluations or self.fine)
        run = self._uncounted(fine)
        m = len(fine.steps) // len(schedule.steps)
        return np.concatenate([run.states[::m], run.final[None]])

    def _uncounted(self, fine: SolverSchedule) -> Run:
        before, run = self.memo.evaluated, self.run(fine)
        self.memo.evaluated = before
        return run


@dataclass
class PipelineProblem:
    """A Diffusers pipeline with prompts and seeds, run through `Rollouts`.

    trials: what to run; its number of steps does not matter, every schedule brings its own. nodes: where the
    truth starts and ends. fine: evaluations of the truth. cache: folder of kept truths, None for the default.
    loss: what a search makes small.
    """

    trials: Rollouts
    nodes: Nodes
    fine: int = 200
    cache: Path | None = None
    loss: Loss = SQUARED
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._base = build(SolverScheduler, self.trials.pipe)
        self.levels = NoiseLevels.from_scheduler(self._base)

    @property
    def memo(self) -> NetworkCache:
        return self.trials.memo

    @property
    def prompts(self) -> list[str]:
        return list(self.trials.prompts)

    def part(self, begin: int, end: int) -> PipelineProblem:
        rows = slice(begin, end)
        trials = replace(self.trials, prompts=self.prompts[rows], seeds=self.trials.seeds[rows])
        trials.memo = self.trials.memo
        part = replace(self, trials=trials)
        part.__dict__["truth"] = self.truth[rows]
        part._shape = self._shape
        return part

    def mean(self) -> tuple[float, ...]:
        """The mean of the converged latents, for each channel."""
        channels = self.truth.reshape(self._shape).mean(axis=(0, *range(2, len(self._shape))))
        return tuple(channels.tolist())

    def pictures(self, final: Floats) -> Tensor:
        vae = decoder_of(self.trials.pipe)
        dtype = torch.float32 if vae is None else next(vae.parameters()).dtype
        device = self.trials.pipe._execution_device
        x = torch.from_numpy(final).reshape(-1, *self._shape[1:]).to(device, dtype)
        with torch.no_grad():
            return self.decoded(x).cpu()

    def decoded(self, latents: Tensor) -> Tensor:
        """The pictures [n, 3, h, w] of latents as the pipeline has them, float32; gradients flow."""
        size: dict[str, Any] = {n: self.trials.options.get(n) for n in ("height", "width", "num_frames")}
        shown = decode(self.trials.pipe, latents, **size).float()
        return shown[:, shown.shape[1] // 2] if shown.ndim == 5 else shown  # of a video, the middle

    def final(self, schedule: SolverSchedule) -> Floats:
        return self._kept(self._trials(schedule).final(self.scheduler(schedule)))

    def _kept(self, latents: Tensor) -> Floats:
        """Flat latents; their shape is remembered for the decoder."""
        self._shape = tuple(latents.shape)
        return _flat(latents)

    def run(self, schedule: SolverSchedule) -> Run:
        scheduler = self.scheduler(schedule)
        path = self._trials(schedule).trajectory(scheduler)
        assert path.final is not None  # noqa: S101 - the run was not stopped
        return Run(self._kept(path.final), _stacked(list(path.corrected)), _data(scheduler, path))

    def predictions(self, schedule: SolverSchedule, states: Floats) -> Floats:
        scheduler, n = self.scheduler(schedule), len(self.prompts)
        shown = torch.from_numpy(states).reshape(len(states), n, *self.sample_shape)
        return _data(scheduler, self._trials(schedule).trajectory(scheduler, shown=shown))

    def final_from(self, schedule: SolverSchedule, states: Floats) -> Floats:
        """The final samples [n, d] of a run that is put on given states [k, n, d] at its first k nodes.

        The first ones are those of the start.
        """
        shown = torch.from_numpy(states).reshape(*states.shape[:2], *self.sample_shape)
        path = self._trials(schedule).trajectory(self.scheduler(schedule), shown=shown)
        assert path.final is not None  # noqa: S101 - the run was not stopped
        return self._kept(path.final)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape[1:]

    @cached_property
    def truth(self) -> Floats:
        order = 3 if self.fine >= FINE else 2
        fine = refined(dpmpp(1, self.nodes, order=1, lower_order_final=False), self.levels, self.fine, order)
        return self._kept(truth(self._trials(fine), self.scheduler(fine), self.cache))

    def truth_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        fine = refined(schedule, self.levels, evaluations or self.fine)
        run = self.run(fine)
        m = len(fine.steps) // len(schedule.steps)
        return np.concatenate([run.states[::m], run.final[None]])

    def scheduler(self, schedule: SolverSchedule) -> Any:
        """A scheduler for the pipeline that runs this schedule."""
        scheduler = copy.deepcopy(self._base)
        scheduler.register_to_config(schedules=book_to_config(schedule))
        return scheduler

    def _trials(self, schedule: SolverSchedule) -> Rollouts:
        self.trials.steps = schedule.nfe
        return self.trials


def _data(scheduler: Any, path: Trajectory) -> Floats:
    """The data predictions of a recorded run."""
    at = zip(path.outputs, path.timesteps.tolist(), path.samples, strict=True)
    return _stacked([noise.x0hat(scheduler, output, t, x) for output, t, x in at])


def _flat(x: Tensor) -> Floats:
    """[n, d] of [n, ...]."""
    return torch.as_tensor(x).double().reshape(len(x), -1).numpy()


def _stacked(parts: list[Tensor]) -> Floats:
    return np.stack([_flat(part) for part in parts])
