"""A pipeline as a problem for searches: run as it stands, on fixed prompts and noises."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffplug.call_arguments import asked_guidance
from diffplug.intercept import current_scheduler
from diffplug.latents import decode, decoder_of
from diffplug.network.cache import NetworkCache, digest
from diffplug.noise import families as noise
from diffplug.rollout import Rollouts, Trajectory
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.library import book_to_config
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.problem import SQUARED, Loss, Run
from diffplug.samplers.search.reference import flat, reference_solution, refined, stacked, states_of
from diffplug.samplers.solver.scheduler import SolverScheduler
from diffplug.scheduler.plug import build, world

__all__ = ["PipelineProblem", "PipelineSetup", "ends_of", "parted", "text_digest"]

Floats = npt.NDArray[np.float64]
FINE = 200  # evaluations of a converged run; with fewer, guidance throws the third order far off


@dataclass
class PipelineProblem:
    """A Diffusers pipeline with prompts and seeds, run through `Rollouts`.

    rollouts: what to run; their number of steps does not matter, every schedule brings its own. nodes: where
    the reference starts and ends. fine: its evaluations. cache: folder of kept references, None for the
    default. loss: what fits make small.
    """

    rollouts: Rollouts
    nodes: Nodes
    fine: int = FINE
    cache: Path | None = None
    loss: Loss = SQUARED
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._base = build(SolverScheduler, self.rollouts.pipe)
        self.levels = NoiseLevels.from_scheduler(self._base)

    @property
    def network_cache(self) -> NetworkCache:
        return self.rollouts.network_cache

    @property
    def prompts(self) -> list[str]:
        return list(self.rollouts.prompts)

    def part(self, begin: int, end: int) -> PipelineProblem:
        rows = slice(begin, end)
        rollouts = replace(self.rollouts, prompts=self.prompts[rows], seeds=self.rollouts.seeds[rows])
        rollouts.network_cache = self.rollouts.network_cache
        part = replace(self, rollouts=rollouts)
        part.__dict__["reference"] = self.reference[rows]
        part._shape = self._shape
        return part

    def mean(self) -> tuple[float, ...]:
        """The mean of the converged latents, for each channel."""
        channels = self.reference.reshape(self._shape).mean(axis=(0, *range(2, len(self._shape))))
        return tuple(channels.tolist())

    def pictures(self, final: Floats) -> Tensor:
        vae = decoder_of(self.rollouts.pipe)
        dtype = torch.float32 if vae is None else next(vae.parameters()).dtype
        device = self.rollouts.pipe._execution_device
        x = torch.from_numpy(final).reshape(-1, *self._shape[1:]).to(device, dtype)
        with torch.no_grad():
            return self.decoded(x).cpu()

    def decoded(self, latents: Tensor) -> Tensor:
        """The pictures [n, 3, h, w] of latents as the pipeline has them, float32; gradients flow."""
        size: dict[str, Any] = {n: self.rollouts.options.get(n) for n in ("height", "width", "num_frames")}
        shown = decode(self.rollouts.pipe, latents, **size).float()
        return shown[:, shown.shape[1] // 2] if shown.ndim == 5 else shown  # of a video, the middle

    def final(self, schedule: SolverSchedule) -> Floats:
        return self._kept(self._rolled(schedule).final(self.scheduler(schedule)))

    def _kept(self, latents: Tensor) -> Floats:
        """Flat latents; their shape is remembered for the decoder."""
        self._shape = tuple(latents.shape)
        return flat(latents)

    def run(self, schedule: SolverSchedule) -> Run:
        scheduler = self.scheduler(schedule)
        path = self._rolled(schedule).trajectory(scheduler)
        assert path.final is not None  # noqa: S101 - the run was not stopped
        return Run(self._kept(path.final), stacked(list(path.corrected)), _data(scheduler, path))

    def predictions(self, schedule: SolverSchedule, states: Floats) -> Floats:
        scheduler, n = self.scheduler(schedule), len(self.prompts)
        shown = torch.from_numpy(states).reshape(len(states), n, *self.sample_shape)
        return _data(scheduler, self._rolled(schedule).trajectory(scheduler, shown=shown))

    def final_from(self, schedule: SolverSchedule, states: Floats) -> Floats:
        """The final samples [n, d] of a run that is put on given states [k, n, d] at its first k nodes.

        The first ones are those of the start.
        """
        shown = torch.from_numpy(states).reshape(*states.shape[:2], *self.sample_shape)
        path = self._rolled(schedule).trajectory(self.scheduler(schedule), shown=shown)
        assert path.final is not None  # noqa: S101 - the run was not stopped
        return self._kept(path.final)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape[1:]

    @cached_property
    def reference(self) -> Floats:
        order = 3 if self.fine >= FINE else 2
        fine = refined(dpmpp(1, self.nodes, order=1, lower_order_final=False), self.levels, self.fine, order)
        return self._kept(reference_solution(self._rolled(fine), self.scheduler(fine), self.cache))

    def reference_states(self, schedule: SolverSchedule, evaluations: int | None = None) -> Floats:
        fine = refined(schedule, self.levels, evaluations or self.fine)
        return states_of(self.run(fine), schedule)

    def scheduler(self, schedule: SolverSchedule) -> Any:
        """A scheduler for the pipeline that runs this schedule."""
        scheduler = copy.deepcopy(self._base)
        scheduler.register_to_config(schedules=book_to_config(schedule))
        return scheduler

    def _rolled(self, schedule: SolverSchedule) -> Rollouts:
        self.rollouts.steps = schedule.nfe
        return self.rollouts


def _data(scheduler: Any, path: Trajectory) -> Floats:
    """The data predictions of a recorded run."""
    at = zip(path.outputs, path.timesteps.tolist(), path.samples, strict=True)
    return stacked([noise.x0hat(scheduler, output, t, x) for output, t, x in at])


@dataclass(frozen=True)
class PipelineSetup:
    """How a pipeline is run, whatever the schedule.

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

    def problem(self, prompts: Sequence[str], first: int, count: int | None = None) -> PipelineProblem:
        """Return so many pairs (default: one a prompt), prompts taken again; seeds count up from `first`."""
        words = list(islice(cycle(prompts), len(prompts) if count is None else count))
        seeds = list(range(self.seed + first, self.seed + first + len(words)))
        rollouts = Rollouts(self.pipe, words, seeds, 4, self.guidance, self.options, self.max_rows)
        return PipelineProblem(rollouts, self.nodes, self.fine, self.cache)

    def metadata(self) -> dict[str, Any]:
        """Return what a schedule is for, JSON; guidance is a number where there is one."""
        call = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {
            "model": fingerprint(self.pipe),
            "architecture": architecture(self.pipe),
            "pipeline": type(self.pipe).__name__,
            "guidance_scale": asked_guidance(self.pipe, {**self.options, **call}),
            "grid": self.nodes.name,
            "truth_steps": self.fine,
            "options": {name: digest(value).hex()[:16] for name, value in self.options.items()},
        }


def ends_of(pipe: Any, grid: str) -> Nodes:
    """Return the grid whose ends are kept; refuse schedulers without ordinary noise levels."""
    build(SolverScheduler, pipe)
    flow = world(current_scheduler(pipe)) == "flow matching"
    return Nodes(kind="name", name=grid, final="zero" if flow else "sigma_min")


def parted(prompts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return prompts to search on, to choose by and to judge by: none is in two sets."""
    words = list(dict.fromkeys(prompts))
    if len(words) < 3:
        raise ValueError(
            f"{len(words)} different prompts: give at least 3, as some are searched on, some choose and some "
            "judge; sixty or more for a result that holds"
        )
    return [*words[::4], *words[3::4]], words[1::4], words[2::4]


def text_digest(prompts: Sequence[Sequence[str]]) -> str:
    """Return a hash of sets of prompts."""
    return hashlib.sha256(json.dumps([list(each) for each in prompts]).encode()).hexdigest()[:16]
