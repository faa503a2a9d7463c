"""The stage "gradient": a schedule's numbers moved up the gradient of a reward, through the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffplug.rewards import score
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.gradient_descent import Descent
from diffplug.samplers.search.leader import Callbacks, Leader
from diffplug.samplers.search.picture_metrics import RewardScore
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.samplers.search.result import Record
from diffplug.samplers.search.settings import Gradient

__all__ = ["check_gradient", "climb_gradient"]

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
