"""Gradients through whole pipelines: those of differences, the same latents, nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import redness
from torch import Tensor

from diffplug.network.gradients import differentiable
from diffplug.rollout import Rollouts
from diffplug.samplers import tune_schedule
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import unipc
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.gradient_stage import LEARNED, Descent, run_with_graph
from diffplug.samplers.search.parameters import Parameters
from diffplug.samplers.search.pipeline_problem import PipelineProblem, ends_of
from diffplug.testing import tiny

PROMPTS = ["a red circle", "a blue square", "a green cross", "a red ring", "a blue star", "a red square"]
OWN = {"prompt", "num_inference_steps", "output_type", "guidance_scale"}


def problem(family: str = "sd15", n: int = 2, **options: Any) -> PipelineProblem:
    pipe = tiny(family)
    inputs = {name: value for name, value in tiny.inputs(family).items() if name not in OWN}
    rollouts = Rollouts(pipe, PROMPTS[:n], list(range(n)), 3, 3.0, options={**inputs, **options})
    return PipelineProblem(rollouts, ends_of(pipe, "linspace"))


def start(family: str = "sd15") -> SolverSchedule:
    final = "sigma_min" if family in ("sd15", "sdxl") else "zero"
    return unipc(3, Nodes(kind="name", name="linspace", final=final))


def brightness(latents: Tensor, prompts: list[str]) -> Tensor:
    return latents.double().square().mean()


@pytest.mark.pipe
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_gradients_are_those_of_differences_for_the_same_latents(family: str, checkpoints: bool) -> None:
    here = problem(family)
    numbers = Parameters(start(family), LEARNED)
    values = torch.from_numpy(numbers.read()).requires_grad_()
    with differentiable(here.rollouts.pipe, checkpoints=checkpoints) as graph:
        latents = run_with_graph(here, numbers, values, graph)
        brightness(latents, []).backward()
    plain = here.final(numbers.write(values.detach().numpy()))
    torch.testing.assert_close(
        latents.detach().double().flatten(1), torch.from_numpy(plain), atol=1e-4, rtol=1e-4
    )

    def at(moved: Tensor) -> float:
        final = here.final(numbers.write(moved.detach().numpy()))
        return float(brightness(torch.from_numpy(final), []))

    assert values.grad is not None
    direction = torch.from_numpy(numbers.read() * 0).index_fill(0, torch.tensor([0, 2, 5, 6, 9]), 1.0)
    slope = float(values.grad @ direction)
    difference = (at(values + 1e-2 * direction) - at(values - 1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(difference, rel=0.05)


@pytest.mark.pipe
def test_time_shifts_have_gradients_too() -> None:
    here, numbers = problem(), Parameters(start(), LEARNED)
    values = torch.from_numpy(numbers.read()).requires_grad_()
    with differentiable(here.rollouts.pipe) as graph:
        brightness(run_with_graph(here, numbers, values, graph), []).backward()
    assert values.grad is not None
    assert (values.grad[-3:].abs() > 0).all()


@pytest.mark.pipe
def test_nothing_is_left_behind_also_after_an_error() -> None:
    here = problem()
    pipe = here.rollouts.pipe
    pipe.unet.requires_grad_(True)
    before = {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()}
    forward, cls, scheduler = vars(pipe.unet).get("forward"), type(pipe), pipe.scheduler

    def broken(latents: Tensor, prompts: list[str]) -> Tensor:
        assert not any(weight.requires_grad for weight in pipe.unet.parameters())
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        Descent(here, start(), broken, steps=2, batch=2).step()
    assert {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()} == before
    assert vars(pipe.unet).get("forward") is forward and type(pipe) is cls and pipe.scheduler is scheduler
    out = pipe(**tiny.inputs("sd15"))[0]
    assert out is not None


@pytest.mark.pipe
def test_a_descent_lowers_its_loss_and_goes_on_as_if_it_had_not_been_stopped() -> None:
    def descent() -> Descent:
        return Descent(problem(), start(), brightness, steps=6, batch=2, rate=2e-2, seed=3)

    whole = descent()
    losses = [whole.step() for _ in range(6)]
    assert losses[-1] < losses[0]
    first, second = descent(), descent()
    for _ in range(3):
        first.step()
    second.restore(json.loads(json.dumps(first.state())))
    assert [second.step() for _ in range(3)] == losses[3:]
    assert second.now == whole.now and whole.now.nfe == 3


@pytest.mark.pipe
def test_what_stops_gradients_is_named() -> None:
    with pytest.raises(ValueError, match="the loss stops gradients"):
        Descent(problem(), start(), lambda x, _: x.detach().mean().requires_grad_(False), batch=1).step()
    analytic = replace(start(), first="zero_x0")
    with pytest.raises(ValueError, match="first step is analytic"):
        Descent(problem(), analytic, brightness)


SMALL: dict[str, Any] = {
    **{"steps": 4, "batch": 2, "check_every": 2, "validation": 2, "test": 2, "truth_steps": 8, "tail": 0},
    **{"rate": 5e-2, "options": {"height": 16, "width": 16}},
}


@pytest.mark.pipe
def test_tuning_raises_a_reward_and_goes_on_from_its_file(tmp_path: Path) -> None:
    place, seen = tmp_path / "five.tuning.json", []
    told = {**SMALL, "ceiling": 1e9, "storage": place, "cache": tmp_path}

    def stop(done: int, *_: float) -> None:
        seen.append(done)
        if done == 3 and len(seen) == 3:
            raise KeyboardInterrupt

    plain = tune_schedule(tiny("sd15"), PROMPTS, start(), redness, 2.0, **{**told, "storage": None})
    with pytest.raises(KeyboardInterrupt):
        tune_schedule(tiny("sd15"), PROMPTS, start(), redness, 2.0, on_step=stop, **told)
    found = tune_schedule(tiny("sd15"), PROMPTS, start(), redness, 2.0, on_step=stop, **told)
    assert seen == [1, 2, 3, 3, 4]
    assert replace(found.schedule, meta={}) == replace(plain.schedule, meta={})
    assert found.history == plain.history
    assert found.improved and found.baseline_test is not None and found.test is not None
    assert found.test["value"] < found.baseline_test["value"]
    meta = found.schedule.meta
    assert meta["metric"] == "reward:redness" and meta["guidance_scale"] == 2.0 and meta["steps"] == 3
    with pytest.raises(
        ValueError, match="is one of metric 'reward:redness', this one has 'reward:colour:blue'"
    ):
        tune_schedule(tiny("sd15"), PROMPTS, start(), "colour:blue", 2.0, **told)
    place.write_text("[]")
    with pytest.raises(ValueError, match="is no unfinished search"):
        tune_schedule(tiny("sd15"), PROMPTS, start(), redness, 2.0, **told)


@pytest.mark.pipe
def test_what_is_further_from_the_converged_latents_than_the_ceiling_is_not_taken(tmp_path: Path) -> None:
    told = {**SMALL, "ceiling": 1e-3, "cache": tmp_path}
    found = tune_schedule(tiny("sd15"), PROMPTS, start(), redness, 2.0, **told)
    assert not found.improved and replace(found.schedule, meta={}) == start()
    assert found.test == found.baseline_test and len(found.history) == 3


def no_gradient(images: Tensor, prompts: list[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": no_gradient}, "'no_gradient' has no gradient"),
        ({"reward": "clop"}, "clop"),
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"batch": 0}, "batch=0"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"ceiling": 0.0}, "ceiling=0.0"),
        ({"prompts": ["a red circle"]}, "1 different prompts"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_run(changed: dict[str, Any], message: str) -> None:
    pipe, given = tiny("sd15"), {"prompts": PROMPTS, "reward": redness, **SMALL, **changed}
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        tune_schedule(pipe, given.pop("prompts"), start(), **given)
    assert not calls
