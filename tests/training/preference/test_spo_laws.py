"""Exact properties of SPO: its density, its first gradient, who is compared, and what a completion judges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffplug.testing.families import SD_BETAS
from diffplug.training.conditions import Conditions
from diffplug.training.noise_path import NoisePath
from diffplug.training.preference.branching import branch
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.pair_loss import pair_loss
from diffplug.training.preference.selectors import score_gap, step_best_worst
from tests.training.preference.test_pso import DOUBLE, gradient, rows, shaken
from tests.training.preference.test_spo import leading, spo
from tests.training.toy import VP


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def scheduler(**config: Any) -> DDIMScheduler:
    told = {**SD_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config}
    made = DDIMScheduler(**told)
    made.set_timesteps(20)
    return made


@pytest.mark.law
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_density_is_that_of_the_step_that_diffusers_takes(eta: float, kind: str, clip: bool) -> None:
    """Its mean is the step with noise of zero; the std is what unit noise adds."""
    made = scheduler(prediction_type=kind, clip_sample=clip)
    told = {"eta": eta, "use_clipped_model_output": clip}
    kernel = Kernel.of(made, NoisePath.of(made), **told)
    x, output, following = normal(3, 2, 4)
    for i in (0, 7, 18):
        t = made.timesteps[i]
        mean, more = (
            made.step(output, t, x, variance_noise=noise, **told).prev_sample
            for noise in (torch.zeros(2, 4, dtype=DOUBLE), torch.ones(2, 4, dtype=DOUBLE))
        )
        normals = torch.distributions.Normal(mean, more - mean)
        steps = torch.tensor([i, i])
        said = kernel.path.predict(output, x, kernel.index[steps]).x0
        x0 = said if kernel.bound is None else kernel.bound(said)
        found = kernel.log_prob(x, x0, following, steps)
        assert torch.allclose(found, normals.log_prob(following).mean(1), rtol=1e-5)


def test_a_clipped_prediction_needs_a_direction_to_match_and_a_last_step_without_noise_is_no_density() -> (
    None
):
    made = scheduler(clip_sample=True)
    with pytest.raises(ValueError, match="clips x0hat and not the direction: set clip_sample=False"):
        Kernel.of(made, NoisePath.of(made), eta=1.0)
    made = scheduler(steps_offset=0)
    kernel = Kernel.of(made, NoisePath.of(made), eta=1.0)
    assert kernel.trainable == list(range(19))
    with pytest.raises(ValueError, match="step 19 of 20 is deterministic"):
        kernel.log_prob(*normal(3, 1, 2), torch.tensor([19]))


@pytest.mark.law
def test_candidates_of_one_state_teach_the_difference_of_their_noises() -> None:
    """dL/dx0hat = -(beta / 2) a / (s D) (z_w - z_l), at a state that both share."""
    kernel, beta = leading(), 10.0
    steps = torch.tensor([4, 10, 17])
    x, x0, better, worse = normal(4, 3, 2)
    x0.requires_grad_()
    ells = [
        kernel.log_ratio(x, x0, x0.detach(), kernel.sample(x, x0.detach(), steps, z), steps)[:, None]
        for z in (better, worse)
    ]
    pair_loss(*ells, beta=beta).errors.sum().backward()
    a, s = (
        torch.tensor([getattr(kernel.forms[i], n) for i in steps], dtype=DOUBLE).view(3, 1)
        for n in ("a", "s")
    )
    assert x0.grad is not None
    assert torch.allclose(x0.grad, -beta / 2 * a / (s * 2) * (better - worse), rtol=1e-9)


def drawn(n: int, k: int, judge: Any, length: int = 1) -> tuple[list[Any], Tensor]:
    """Segments of a roll-out of one state, by a network that says half of what it sees; the noise."""
    x, z = normal(1, 2).expand(n, 2), normal(n, k, 20, 2, seed=1)
    picks = torch.rand(n, 20, generator=torch.Generator().manual_seed(2))
    told = Conditions({"told": torch.zeros(n, 2)})
    return branch(leading(), lambda x, s, c: x / 2, judge, told, x, z, picks, first=4, length=length), z


@pytest.mark.law
@pytest.mark.parametrize("length", [1, 4])
def test_sixteen_transitions_of_a_prompt_are_compared(length: int) -> None:
    segments, _ = drawn(3, 2, lambda x0, s: x0[:, 0], length)
    kernel = leading()
    steps = [segment.first + i for segment in segments for i in range(segment.length)]
    times = VP.timesteps(kernel.index[steps]).tolist()
    assert times == [*range(751, 0, -50)]
    assert [segment.scored for segment in segments] == [*range(4 + length, 21, length)]


@pytest.mark.law
def test_candidates_are_independent_given_their_state() -> None:
    n, k = 4000, 3
    segments, _ = drawn(n, k, lambda x0, s: x0[:, 0])
    kernel = leading()
    for segment in segments[::5]:
        form = kernel.forms[segment.first]
        x = segment.states[:, :, 0]
        noise = (segment.states[:, :, 1] - form.a * x / 2 - form.b * x) / form.s
        flat = noise.flatten(1)
        covariance = flat.T @ flat / n
        assert float((covariance - torch.eye(2 * k, dtype=DOUBLE)).abs().max()) < 5 * math.sqrt(2 / n)
        with_state = (flat[:, :, None] * x[:, 0, None, :]).mean(0) / x[:, 0].std(0).clamp(min=1)
        assert float(with_state.abs().max()) < 5 * max(1.0, float(x.abs().mean())) / math.sqrt(n)


@pytest.mark.law
def test_of_two_candidates_the_sign_of_the_difference_decides() -> None:
    scores = normal(200, 2)
    gap = scores[:, 0] - scores[:, 1]
    pairs = step_best_worst(scores, 0.3)
    assert pairs.row.tolist() == (gap.abs() > score_gap(0.3)).nonzero()[:, 0].tolist()
    assert pairs.winner.tolist() == (gap[pairs.row] < 0).long().tolist()
    assert torch.equal(pairs.loser, 1 - pairs.winner)


@pytest.mark.law
def test_a_judge_that_completes_the_picture_is_monte_carlo_preference() -> None:
    """K = 2, j = 1: each step prefers the candidate whose own deterministic end has the higher reward."""
    kernel = Kernel.ddim(VP, 4, 1.0)
    plain = Kernel.ddim(VP, 4, 0.0)
    objective = spo(kernel, first=0)
    shaken(objective)
    given = rows(4)
    told = objective.conditions[given.items(16)]

    def completed(x: Tensor, step: int, conditions: Conditions) -> Tensor:
        for i in range(step, 4):
            at = torch.full((len(x),), i)
            x = plain.mean(x, plain.predict(objective.network, x, at, conditions), at)
        return x[:, 0].double()

    class Completing:
        """Judges candidates, not their predictions: it is told the states by the objective's roll-out."""

        states: Tensor

        def __call__(self, x0: Tensor, prompts: list[str], timestep: float) -> Tensor:
            step = [round(float(VP.timesteps(kernel.index[i : i + 1]))) for i in range(4)]
            at = step.index(round(timestep)) if round(timestep) in step else 4
            many = told[torch.arange(4).repeat_interleave(2)]
            return completed(self.states if at < 4 else x0, at, many)

    judge = Completing()
    own = objective.kernel.predict

    def seen(network: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if len(x) == 8:
            judge.states = x
        return own(network, x, *rest, **options)

    object.__setattr__(objective.kernel, "predict", seen)
    objective.step_scorer = judge
    segments = objective.segments(given, told, ["p"] * 4)
    assert [segment.first for segment in segments] == [0, 1, 2]
    expected = []
    for segment in segments:
        ends = torch.stack(
            [completed(segment.states[:, k, 1], segment.first + 1, told) for k in (0, 1)], dim=1
        )
        assert torch.allclose(segment.scores, ends, rtol=1e-9)
        states = segment.states[:, :, 0].flatten(0, 1), segment.states[:, :, 1].flatten(0, 1)
        at, many = torch.full((8,), segment.first), told[torch.arange(4).repeat_interleave(2)]
        x0, ref = (
            kernel.predict(objective.network, states[0], at, many, original=original)
            for original in (False, True)
        )
        ell = kernel.log_ratio(states[0], x0, ref, states[1], at).view(4, 2)
        sign = torch.where(ends[:, 0] > ends[:, 1], 1.0, -1.0)
        expected.append(-torch.nn.functional.logsigmoid(10.0 * sign * (ell[:, 0] - ell[:, 1])))
    found = objective.loss(rows(4))
    object.__delattr__(objective.kernel, "predict")
    assert found.weights is not None and found.weights.tolist() == [3.0] * 4
    assert torch.allclose(found.errors, torch.stack(expected).mean(0), rtol=1e-8)


@pytest.mark.law
def test_the_gradient_does_not_depend_on_how_many_prompts_are_worked_on_at_once() -> None:
    whole, parts = spo(Kernel.ddim(VP, 4, 1.0), first=0), spo(Kernel.ddim(VP, 4, 1.0), first=0)
    for objective in (whole, parts):
        shaken(objective)
    g = gradient(whole, rows(4))  # type: ignore[arg-type]
    pieces = [gradient(parts, rows(2, first=i, batch=4)) for i in (0, 2)]  # type: ignore[arg-type]
    assert torch.allclose(g, pieces[0] + pieces[1], rtol=1e-9, atol=1e-14)
