"""SPO: the structure of its roll-outs, who goes on, thresholds, shared evaluations, reductions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffplug.testing.families import SD_BETAS
from diffplug.training.conditions import Conditions
from diffplug.training.objectives.preference.pso import PSO, PSOSettings
from diffplug.training.objectives.preference.spo import SPO, SPOSettings, thresholds
from diffplug.training.preference.branching import branch
from diffplug.training.preference.kernel import Kernel
from tests.training.preference.test_pso import DOUBLE, gradient, rightmost, rows, shaken
from tests.training.toy import VP, conditions, network

PROMPTS = [f"prompt {i}" for i in range(16)]


def leading(steps: int = 20) -> Kernel:
    made = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    made.set_timesteps(steps)
    return Kernel.of(made, VP, eta=1.0)


def spo(kernel: Kernel | None = None, scorer: Any = rightmost, **settings: Any) -> SPO:
    told = SPOSettings(**{"guidance": 1.0, "threshold": 0.0, "clip": "none", "candidates": 2, **settings})
    net = network(dtype=DOUBLE)
    return SPO(net, kernel or leading(), conditions(16, DOUBLE), PROMPTS, told, scorer=scorer)


def counted(length: int, k: int) -> tuple[list[Any], list[int], list[int]]:
    """Segments, rows of every evaluation, and judged steps of a roll-out of 3 prompts."""
    seen: list[int] = []
    judged: list[int] = []

    def predict(x: Tensor, step: Tensor, told: Conditions) -> Tensor:
        seen.append(len(x))
        return x / 2

    def judge(x0: Tensor, step: int) -> Tensor:
        judged.append(step)
        return x0[:, 0].double()

    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(*s, generator=generator) for s in ((3, 2), (3, k, 20, 2)))
    picks = torch.rand(3, 20, generator=generator)
    told = Conditions({"told": torch.zeros(3, 2)})
    found = branch(leading(), predict, judge, told, x, z, picks, first=4, length=length)
    return found, seen, judged


@pytest.mark.law
@pytest.mark.parametrize(("length", "k"), [(1, 4), (4, 2)])
def test_the_structure_of_a_rollout(length: int, k: int) -> None:
    segments, seen, judged = counted(length, k)
    assert sum(seen) == 3 * (5 + 15 * k)
    times = [float(VP.timesteps(leading().index[s : s + 1])) if s < 20 else 0.0 for s in judged]
    if length == 4:
        assert times == [551, 351, 151, 0]
    else:
        assert times == [*range(701, 0, -50), 0] and len(judged) == 16
    for segment in segments:
        first = segment.states[:, :, 0]
        assert torch.equal(first, first[:, :1].expand_as(first)) and segment.length == length
        assert not torch.equal(segment.states[:, 0, 1], segment.states[:, 1, 1])
    for one, other in pairwise(segments):
        row = torch.arange(3)
        assert torch.equal(one.states[row, one.chosen, -1], other.states[:, 0, 0])


@pytest.mark.law
def test_who_goes_on_is_uniform_and_blind_to_the_scores() -> None:
    n, k, kernel = 3000, 4, Kernel.ddim(VP, 4, 1.0)
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(*s, generator=generator) for s in ((n, 1), (n, k, 4, 1)))
    picks = torch.rand(n, 4, generator=generator)
    told = Conditions({"told": torch.zeros(n, 1)})
    segments = branch(
        kernel, lambda x, s, c: x / 2, lambda x0, s: x0[:, 0].double(), told, x, z, picks, first=0
    )
    for segment in segments:
        count = torch.bincount(segment.chosen, minlength=k).double()
        chi = float(((count - n / k).square() / (n / k)).sum())
        assert chi < 16.3  # 0.1 % of chi-squared with 3 degrees
        rank = (segment.scores.argsort(1).argsort(1))[torch.arange(n), segment.chosen].double()
        assert abs(float(rank.mean()) - (k - 1) / 2) < 4 * float(rank.std()) / math.sqrt(n)
    moved = segments[0].states[:, :, 1] - segments[0].states[:, :, 1].mean(0)
    given = moved - moved.mean(1, keepdim=True)
    z0 = z[:, :, 0, 0]
    assert abs(float((z0[:, 0] * z0[:, 1]).mean())) < 4 / math.sqrt(n)
    assert float(given.std()) > 0


@pytest.mark.law
@pytest.mark.parametrize("length", [1, 4])
def test_one_evaluation_of_a_shared_state_has_the_gradient_of_two(length: int) -> None:
    one, other = spo(length=length), spo(length=length)
    other.share = False
    shaken(one), shaken(other)
    g, h = gradient(one, rows(3)), gradient(other, rows(3))  # type: ignore[arg-type]
    assert torch.allclose(g, h, rtol=1e-10, atol=1e-13) and float(g.norm()) > 0
    assert torch.allclose(one.loss(rows(3)).errors, other.loss(rows(3)).errors, rtol=1e-12)


@pytest.mark.law
def test_at_the_start_the_loss_is_log_two_and_labels_flip_its_gradient() -> None:
    one, other = spo(), spo(scorer=lambda x, p: -rightmost(x, p))
    loss = one.loss(rows(4))
    assert torch.allclose(loss.errors, torch.full_like(loss.errors, math.log(2)))
    assert loss.weights is not None and loss.weights.tolist() == [16.0] * 4
    g, h = gradient(one, rows(4)), gradient(other, rows(4))  # type: ignore[arg-type]
    assert torch.allclose(g, -h, rtol=1e-8, atol=1e-14) and float(g.norm()) > 0


@pytest.mark.law
def test_equal_scores_are_never_taken() -> None:
    loss = spo(scorer=lambda x, p: torch.zeros(len(x), dtype=DOUBLE)).loss(rows(4))
    assert loss.weights is not None and not bool(loss.weights.any())


@pytest.mark.law
def test_one_long_branch_judged_by_the_picture_is_trajectory_preference() -> None:
    kernel = Kernel.ddim(VP, 4, 1.0)
    one = spo(kernel, first=0, length=4, beta=30.0)
    shaken(one)
    given = rows(4)
    item = given.items(16)
    told = one.conditions[item]
    (segment,) = one.segments(given, told, [PROMPTS[i] for i in item.tolist()])
    loss = one.loss(rows(4))
    pso = PSO(one.network, kernel, one.conditions, PROMPTS, PSOSettings(beta=30.0, anchor=0.0, reduce="step"),
              scorer=rightmost)  # fmt: skip
    from diffplug.training.preference.online import Drawn
    from diffplug.training.preference.rollout import Paths

    paths = Paths(segment.states.flatten(0, 1), segment.states.flatten(0, 1)[:, 1:])
    drawn = Drawn(paths, told[torch.arange(4).repeat_interleave(2)], segment.scores)
    assert torch.allclose(pso.compared(drawn).errors, loss.errors, rtol=1e-10)


@pytest.mark.law
def test_a_judge_that_guesses_does_not_move_the_model() -> None:
    generator = torch.Generator().manual_seed(3)
    objective = spo(
        Kernel.ddim(VP, 4, 1.0), lambda x, p: torch.randn(len(x), generator=generator, dtype=DOUBLE), first=0
    )
    honest = spo(Kernel.ddim(VP, 4, 1.0), first=0)
    toward, moves = (
        torch.stack([gradient(one, rows(4, update)) for update in range(60)])  # type: ignore[arg-type]
        for one in (honest, objective)
    )
    along = moves @ toward.mean(0)
    assert abs(float(along.mean())) < 3.5 * float(along.std()) / math.sqrt(60)
    assert float(moves.mean(0).norm()) < 0.3 * float(toward.mean(0).norm())


@pytest.mark.law
def test_a_threshold_may_follow_the_noise() -> None:
    found = thresholds(leading(), 0.35, 0.5)
    assert found[0] == pytest.approx(0.5) and found[-1] == pytest.approx(0.35)
    assert found == sorted(found, reverse=True) and thresholds(leading(), 0.3, None) == [0.3] * 20


def test_guidance_reaches_policy_and_reference() -> None:
    plain, guided = spo(Kernel.ddim(VP, 4, 1.0), first=0), spo(Kernel.ddim(VP, 4, 1.0), first=0, guidance=3.0)
    assert float(guided.loss(rows(4)).errors[0].detach()) == pytest.approx(math.log(2))
    assert not torch.allclose(
        gradient(plain, rows(4)),
        gradient(guided, rows(4)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1"),
        ({"length": 0}, "length at least 1"),
        ({"guidance": 0.5}, "guidance must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spo(**changes)
