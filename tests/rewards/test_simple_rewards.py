"""Rewards without networks follow their closed forms; sums and standardised scores are what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffplug import rewards
from diffplug.registry import REWARDS
from diffplug.rewards import Standardised, Weighted
from diffplug.rewards.colour import ColourReward
from diffplug.rewards.jpeg import JpegReward
from diffplug.rewards.sharpness import SharpnessReward

NOISE = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
TEXTS = ["a", "b", "c"]
OPTIONS: dict[str, dict[str, Any]] = {"jpeg": {}, "colour": {}, "sharpness": {}}


@pytest.mark.contract
@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_scores_are_float64_and_rows_stand_alone(name: str, dtype: torch.dtype) -> None:
    reward: Any = rewards.get(name)
    images = NOISE.to(dtype)
    scores = reward(images, TEXTS)
    assert scores.dtype == torch.float64 and scores.shape == (3,) and scores.isfinite().all()
    alone = torch.cat([reward(images[i : i + 1], TEXTS[:1]) for i in range(3)])
    assert torch.allclose(scores, alone, atol=1e-6)
    assert reward(images[:0], []).shape == (0,)


@pytest.mark.contract
def test_every_reward_says_whether_it_is_differentiable() -> None:
    for name in REWARDS.names():
        assert isinstance(getattr(REWARDS.get(name), "differentiable", None), bool), name


@pytest.mark.contract
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_broken_picture_gets_no_score(name: str) -> None:
    images = NOISE.clone()
    images[1, 0, 3, 4] = math.nan
    reward: Any = rewards.get(name)
    assert reward(images, TEXTS).isnan().tolist() == [False, True, False]


def test_jpeg_is_the_size_of_the_file() -> None:
    flat = torch.full((1, 3, 24, 32), 0.5)
    scores = JpegReward()(torch.cat([flat, NOISE[:1]]), TEXTS[:2])
    assert scores[0] > scores[1] and (scores < 0).all()
    assert (scores * 1000).frac().abs().max() < 1e-9  # whole bytes
    assert (JpegReward(quality=30)(NOISE, TEXTS) > JpegReward()(NOISE, TEXTS)).all()
    assert torch.equal(rewards.get("-jpeg")(NOISE, TEXTS), -JpegReward()(NOISE, TEXTS))
    for wrong in ("0", "96", "high", "-5"):
        with pytest.raises(ValueError, match=r"1 to 95"):
            rewards.get(f"jpeg:{wrong}")


@pytest.mark.law
@given(rgb=st.tuples(*[st.integers(0, 255)] * 3), other=st.tuples(*[st.integers(0, 255)] * 3))
@settings(max_examples=50, deadline=None)
def test_colour_is_a_distance(rgb: tuple[int, ...], other: tuple[int, ...]) -> None:
    reward = ColourReward("#{:02x}{:02x}{:02x}".format(*rgb))
    image = (torch.tensor(other) / 255)[None, :, None, None].expand(1, 3, 4, 5)
    distance = math.dist(rgb, other) / 255 / math.sqrt(3)
    assert reward(image, ["a"]).item() == pytest.approx(-distance, abs=1e-6)


def test_colours_by_name_and_their_gradient() -> None:
    assert ColourReward("navy").rgb == ColourReward("#000080").rgb
    assert ColourReward("#f80").rgb == ColourReward("#ff8800").rgb
    images = torch.zeros(1, 3, 4, 4)
    images[:, 0] = 1.0
    images.requires_grad_()
    ColourReward("red")(images, ["a"]).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()  # also where the distance is 0
    for wrong, told in (
        ("rde", "Did you mean 'red'"),
        ("#12345", "Or write #rrggbb"),
        ("#xxyyzz", "hexadecimal"),
    ):
        with pytest.raises(ValueError, match=told):
            rewards.get(f"colour:{wrong}")


@pytest.mark.law
def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    luma = np.tensordot([0.299, 0.587, 0.114], NOISE.double().numpy(), axes=(0, 1)) * 255
    wanted = [ndimage.laplace(row, mode="mirror").var() for row in luma]
    assert np.allclose(SharpnessReward()(NOISE, TEXTS), wanted, rtol=1e-5)
    assert SharpnessReward()(torch.full((1, 3, 4, 4), 0.7), ["a"]).item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="2x2 pixels or more"):
        SharpnessReward()(torch.zeros(1, 3, 1, 9), ["a"])


def channel(i: int) -> Any:
    def mean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, i].mean((1, 2))

    mean.differentiable = True  # type: ignore[attr-defined]
    return mean


@pytest.mark.law
def test_sums_and_their_gradient() -> None:
    images = NOISE.clone().requires_grad_()
    both = Weighted([channel(0), channel(2)], [2.0, -0.5])
    scores = both(images, TEXTS)
    wanted = 2 * images[:, 0].mean((1, 2)) - 0.5 * images[:, 2].mean((1, 2))
    assert both.differentiable and torch.allclose(scores, wanted.double())
    (ours,), (theirs,) = (torch.autograd.grad(s.sum(), images) for s in (scores, wanted))
    assert torch.allclose(ours, theirs)
    assert not Weighted([channel(0), JpegReward()], [1.0, 1.0]).differentiable
    assert not rewards.score(both, images, TEXTS).requires_grad


def test_sums_check_what_they_are_given() -> None:
    with pytest.raises(ValueError, match="1 rewards and 2 weights"):
        Weighted([channel(0)], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be finite"):
        Weighted([channel(0)], [math.nan])
    with pytest.raises(ValueError, match="reward bad must return 3 numbers"):

        def bad(images: torch.Tensor, prompts: list[str]) -> list[float]:
            return [1.0]

        Weighted([channel(0), bad], [1.0, 1.0])(NOISE, TEXTS)


@pytest.mark.law
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_scores_have_the_mean_and_deviation_of_all_so_far(batches: list[list[float]]) -> None:
    todo = iter(batches)
    running = Standardised(lambda images, prompts: next(todo))
    for i, batch in enumerate(batches):
        scores = running(torch.zeros(len(batch), 3, 2, 2), ["a"] * len(batch))
        seen = np.concatenate(batches[: i + 1])
        deviation = seen.std(ddof=1) if len(seen) > 1 else 1.0
        assert running.mean == pytest.approx(seen.mean(), rel=1e-6, abs=1e-6)
        assert running.std == pytest.approx(deviation or 1.0, rel=1e-4, abs=1e-3) or deviation < 1e-3
        wanted = (np.array(batch) - running.mean) / running.std
        assert np.allclose(scores, wanted)


def test_given_frozen_and_broken_scales() -> None:
    fixed = Standardised(channel(0), mean=0.5, std=0.1)
    assert torch.allclose(fixed(NOISE, TEXTS), (NOISE[:, 0].mean((1, 2)).double() - 0.5) / 0.1)
    assert fixed.differentiable
    values = iter([[1.0, math.nan, 3.0], [100.0], [math.inf]])
    running = Standardised(lambda images, prompts: next(values))
    scores = running(NOISE, TEXTS)
    assert scores.isnan().tolist() == [False, True, False] and running.mean == 2.0
    assert running.freeze() is running and running.mean == 2.0
    assert running(NOISE[:1], ["a"]).item() == pytest.approx((100 - 2) / running.std)
    assert running(NOISE[:1], ["a"]).item() == math.inf
    for options in ({"mean": 1.0}, {"mean": 0.0, "std": 0.0}, {"mean": math.nan, "std": 1.0}):
        with pytest.raises(ValueError, match="mean"):
            Standardised(channel(0), **options)
