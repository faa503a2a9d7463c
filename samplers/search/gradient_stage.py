"""The stage "gradient": Adam on the numbers of a schedule, through the pipeline, up a reward.

What it moves: the weights of all outputs and states so far at every step (arXiv 2510.17699), and the
timesteps that the network is told. Every step sees noises that it has not seen before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.intercept import StepCall, StepInterceptor, Undo, current_scheduler, intercept_step
from diffplug.network.gradients import WithGraph, differentiable
from diffplug.noise import families as noise
from diffplug.rewards import score
from diffplug.rollout import with_sample
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.leader import Callbacks, Leader
from diffplug.samplers.search.parameters import SHIFT_UNIT, Parameters
from diffplug.samplers.search.picture_metrics import RewardScore
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.result import Record
from diffplug.samplers.search.settings import Gradient
from diffplug.samplers.solver.table import DATA, STATES, Histories, SolverTable, Term, advance

__all__ = ["LEARNED", "Descent", "check_gradient", "climb_gradient", "run_with_graph"]

DECAY = 0.05  # of the learning rate, what is left at the end
SHIFT_RATE = 10.0  # over the weights' learning rate, that of time shifts
LAST_SEED = 2**62
MOMENTS = ("exp_avg", "exp_avg_sq")
LEARNED = ("weights", "states", "shifts")


@dataclass
class Descent:
    """Adam (arXiv 1412.6980) on the numbers of a schedule; its learning rate falls along half a cosine.

    problem: the pipeline, and the prompts that are drawn from. loss: (final latents as the pipeline has them,
    their prompts) to one number with a graph. batch: pairs of prompt and noise at a step. rate: the
    learning rate of weights; that of time shifts is the same in timesteps, times 100. checkpoints: see
    `differentiable`. Draws depend on seed and step alone, so that a descent that was stopped goes on as if
    it had not been (`state`, `restore`).
    Raises ValueError for a schedule whose first step is analytic, for a pipeline or a loss that stops
    gradients, and for a loss that is not finite.
    """

    problem: PipelineProblem
    schedule: SolverSchedule
    loss: Callable[[Tensor, list[str]], Tensor]
    steps: int = 400
    batch: int = 16
    rate: float = 4e-3
    seed: int = 0
    checkpoints: bool = True

    def __post_init__(self) -> None:
        if self.schedule.first != "model":
            raise ValueError(
                f"the schedule's first step is analytic ({self.schedule.first!r}), and that takes no "
                "corrections: start from a schedule with first='model'"
            )
        self.done = 0
        self._numbers = Parameters(self.schedule, LEARNED)
        values = torch.from_numpy(self._numbers.read())
        weights = self._numbers.counts[0]
        self._weights = values[: 2 * weights].clone().requires_grad_()
        self._shifts = values[2 * weights :].clone().requires_grad_()
        groups = [
            {"params": [self._weights], "lr": self.rate},
            {"params": [self._shifts], "lr": SHIFT_RATE * self.rate},
        ]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    @property
    def now(self) -> SolverSchedule:
        """The schedule that the descent has come to."""
        return self._numbers.write(torch.cat([self._weights, self._shifts]).detach().numpy())

    def step(self) -> float:
        """Take one step down; return the loss before it."""
        self._set_rate()
        pairs = self._pairs()
        pipe = pairs.rollouts.pipe
        with differentiable(pipe, checkpoints=self.checkpoints) as graph, torch.enable_grad():
            latents = run_with_graph(pairs, self._numbers, torch.cat([self._weights, self._shifts]), graph)
            loss = self.loss(latents, pairs.prompts)
            if not loss.requires_grad:
                where = "the loss" if latents.requires_grad else f"{type(pipe).__name__}'s call"
                raise ValueError(f"{where} stops gradients: a descent needs them all the way to the numbers")
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {float(loss):g} at step {self.done}: it has to be finite")
            self._adam.zero_grad()
            loss.backward()
        if bool(torch.isfinite(torch.cat([self._weights.grad, self._shifts.grad])).all()):  # type: ignore[list-item]
            self._adam.step()
        else:
            warnings.warn(f"step {self.done}: the gradient is not finite, and is left out", stacklevel=2)
        self.done += 1
        return float(loss.detach())

    def _set_rate(self) -> None:
        left = 0.5 * (1 + np.cos(np.pi * min(self.done / self.steps, 1.0)))
        for group, factor in zip(self._adam.param_groups, (1.0, SHIFT_RATE), strict=True):
            group["lr"] = self.rate * factor * (DECAY + (1 - DECAY) * left)

    def _pairs(self) -> PipelineProblem:
        """Return prompts and noises of this step."""
        draw = np.random.default_rng([self.seed, self.done])
        known = self.problem.prompts
        prompts = [known[i] for i in draw.integers(0, len(known), self.batch)]
        seeds = draw.integers(LAST_SEED // 2, LAST_SEED, self.batch).tolist()
        rollouts = replace(self.problem.rollouts, prompts=prompts, seeds=seeds, max_rows=self.batch)
        return replace(self.problem, rollouts=rollouts)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, JSON."""
        moments = [self._adam.state.get(each, {}) for each in (self._weights, self._shifts)]
        return {
            "done": self.done,
            "numbers": [each.tolist() for each in (self._weights, self._shifts)],
            "moments": [
                [m[name].tolist() for name in ("exp_avg", "exp_avg_sq")] if m else [] for m in moments
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` has returned."""
        self.done = int(state["done"])
        rows = zip((self._weights, self._shifts), state["numbers"], state["moments"], strict=True)
        for each, numbers, moments in rows:
            each.data.copy_(torch.tensor(numbers, dtype=each.dtype))
            if moments:
                tensors = (torch.tensor(moment, dtype=each.dtype) for moment in moments)
                known = dict(zip(MOMENTS, tensors, strict=True))
                self._adam.state[each] = {"step": torch.tensor(float(self.done)), **known}


def run_with_graph(problem: PipelineProblem, numbers: Parameters, values: Tensor, graph: WithGraph) -> Tensor:
    """Return the final latents of a pipeline's pairs, all in one call, with the graph back to the numbers.

    values: the numbers of a schedule (`Parameters` of LEARNED), float64 on the host. graph: of
    `differentiable`.
    """
    bare = replace(numbers.schedule, deltas=None, time_shift=None)
    everything = slice(0, len(problem.rollouts.prompts))
    problem.rollouts.steps = bare.nfe
    return problem.rollouts.latents(problem.scheduler(bare), everything, _GraphRun(numbers, values), graph)


def _added(table: SolverTable, numbers: Parameters, values: Tensor) -> SolverTable:
    """Return the table with additions to the weights of its predictors that carry a graph."""
    weights = numbers.counts[0]
    data, states = values[:weights], values[weights : 2 * weights]
    steps, begin = [], 0
    for i, step in enumerate(table.steps):
        more = [
            Term(history, -1 - k, part[begin + k])
            for history, part in ((DATA, data), (STATES, states))
            for k in range(i + 1)
        ]
        begin += i + 1
        steps.append(replace(step, predict=(*step.predict, *more)))
    return replace(table, steps=tuple(steps))


class _GraphRun(StepInterceptor):
    """A plug that steps by tensors in place of the scheduler's numbers; values: see `run_with_graph`."""

    def __init__(self, numbers: Parameters, values: Tensor) -> None:
        self.numbers, self.values = numbers, values
        self.table: SolverTable | None = None
        self.histories: Histories = ([], [], [])
        self.index = 0

    def attach(self, pipe: Any) -> Undo:
        return intercept_step(current_scheduler(pipe), self)

    def on_set_timesteps(self, scheduler: Any) -> None:
        self.table, self.histories, self.index = None, ([], [], []), 0
        shifts = SHIFT_UNIT * self.values[len(self.values) - len(scheduler.table.steps) :]
        times: Tensor = scheduler.timesteps.float()
        scheduler.timesteps = times + shifts.to(times)

    def on_step(self, call: StepCall) -> Any:
        call.timestep = call.timestep.detach()
        x = call.sample.float() if call.sample.dtype.itemsize < 4 else call.sample
        data = noise.x0hat(call.scheduler, call.model_output, call.timestep, call.sample).to(x.dtype)
        if self.table is None:
            self.table = _added(call.scheduler.table, self.numbers, self.values).placed(x)
        with torch.no_grad():
            result = call.run()  # moves the scheduler on
        step, self.index = self.table.steps[self.index], self.index + 1
        following = advance(step, self.histories, data, x, self.table.kept)[1]
        return with_sample(result, following.to(call.sample.dtype))


STATE = "gradient"  # the record's entry with the state of the descent


def check_gradient(metric: Any, problem: Any) -> None:
    """Raise ValueError unless the metric is a reward with a gradient and there is a pipeline to run."""
    if not isinstance(metric, RewardScore) or not isinstance(problem, PipelineProblem):
        raise ValueError(
            f"the stage 'gradient' climbs a reward, and this search is for {metric.name!r}: give "
            "--for reward:SPEC, or leave the stage out"
        )
    device = problem.rollouts.pipe._execution_device
    grey = torch.full((1, 3, 64, 64), 0.5, device=device, requires_grad=True)
    if not score(metric.reward, grey, [problem.prompts[0]], graph=True).requires_grad:
        raise ValueError(
            f"the reward {metric.label!r} has no gradient with respect to its images: the stage 'gradient' "
            "needs a differentiable one, such as clip or shapes-clip; search by others with other stages"
        )


def climb_gradient(
    problem: PipelineProblem,
    start: SolverSchedule,
    leader: Leader,
    record: Record,
    settings: Gradient,
    seed: int,
    callbacks: Callbacks,
) -> tuple[tuple[float, float], ...]:
    """Show the leader what Adam passes through; return (steps, value on validation pairs) at every look.

    problem: the prompts that are learned from; noises are fresh at every step. An interrupted climb is
    continued from its last look.
    """
    metric, judge = leader.judge.metric, leader.judge
    loss = _loss(metric, problem)
    descent = Descent(
        problem, start, loss, settings.steps, settings.batch, settings.rate, seed, settings.checkpoints
    )
    begin = start.to_json()
    history = [(0.0, judge.score(start).value)]
    kept = record.read(STATE)
    if kept and kept["from"] == begin:
        descent.restore(kept["descent"])
        history = [(float(at), float(value)) for at, value in kept["history"]]
        for passed in kept["passed"]:
            leader.watch(SolverSchedule.from_json(passed))
    while descent.done < descent.steps:
        try:
            reached, done = -descent.step(), descent.done
        except ValueError as error:
            raise ValueError(f"{metric.name}: {error}") from error
        if done % settings.check_every == 0 or done == descent.steps:
            leader.watch(descent.now)
            history.append((float(done), judge.score(descent.now).value))
            record.write(STATE, _state(begin, descent, leader, history))
        best = judge.score(leader.seen[-1] if leader.seen else start).value
        callbacks.on_step(done, reached, -best)
    return tuple(history)


def _state(
    begin: Any, descent: Descent, leader: Leader, history: list[tuple[float, float]]
) -> dict[str, Any]:
    passed = [schedule.to_json() for schedule in leader.seen]
    return {"from": begin, "descent": descent.state(), "history": history, "passed": passed}


def _loss(metric: Any, problem: PipelineProblem) -> Callable[[Tensor, list[str]], Tensor]:
    """Return less the mean reward of the pictures of latents."""

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        return -score(metric.reward, problem.decoded(latents), prompts, graph=True).mean()

    return loss
