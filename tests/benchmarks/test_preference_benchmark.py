"""The preference benchmark: its control, its toy's exact prediction, and paired differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.preference import ring, shapes
from diffplug import rewards
from diffplug.training.preference.gauges import diversity, edge_sharpness


def test_the_coin_keeps_ties_and_flips_both_candidates_of_a_prompt() -> None:
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [p for p in ("a red circle", "a blue square", "a green circle", "a red square") for _ in "ab"]
    told = rewards.score(rewards.get(shapes.REWARD), images, prompts).numpy()
    flipped = shapes.coin(images, prompts)
    sign = np.where(told == 0, 0, flipped / np.where(told == 0, 1, told))
    assert np.array_equal(np.abs(told), np.abs(flipped))
    assert all(len({v for v in pair if v}) <= 1 for pair in sign.reshape(-1, 2).tolist())


def test_paired_differences_use_the_same_prompts() -> None:
    def row(right: list[bool]) -> Any:
        return shapes.Row("", 0, 0, (), 0, 0, 0, tuple(right))

    gain, error = shapes.paired(row([True, True, False, True]), row([True, False, False, False]))
    assert gain == 50.0 and error == pytest.approx(100 * np.std([0, 1, 0, 1], ddof=1) / 2)


def test_seeds_of_one_method_are_one_figure_with_an_error_of_prompts_and_seeds() -> None:
    def row(name: str, right: list[bool]) -> Any:
        return shapes.Row(name, 0, 0, (), 0, 0, 0, tuple(right))

    start, other = [False] * 4, [True, True, False, False]
    rows = [row("start", start), row("pso-0", other), row("pso-1", start), row("random-0", other)]
    found = shapes.over_seeds(rows)
    assert found.keys() == {"pso"}
    gain, error, count = found["pso"]
    prompts, seeds = 100 * np.std([0.5, 0.5, 0, 0], ddof=1) / 2, np.std([50, 0], ddof=1) / math.sqrt(2)
    assert (gain, count) == (25.0, 2) and error == pytest.approx(math.hypot(prompts, seeds))


def test_the_two_ways_of_the_toy_of_details_ask_the_network_as_often() -> None:
    candidates, steps, first = 4, 20, 4
    spo = first + 1 + (steps - first - 1) * candidates + 2 * (steps - first - 1)
    trajectory = 2 * steps + 2 * 2 * (steps - 1)
    assert round(ring.SPO_BATCH * spo / trajectory) == ring.TRAJECTORY_BATCH


@pytest.mark.law
def test_the_toys_prediction_is_the_mean_of_its_data() -> None:
    path, generator = ring.path_of("sample"), torch.Generator().manual_seed(0)
    index = torch.tensor([500.0])
    alpha, sigma = (float(v) for v in path.levels(index))
    x = alpha * ring.centres()[:1] + torch.tensor([[0.3, 0.2]])
    data = ring.sampled(400_000, generator)
    weight = (-(x - alpha * data).square().sum(1) / (2 * sigma**2)).softmax(0)
    told = ring.exact(x, index, path)
    assert torch.allclose(told, (weight[:, None] * data).sum(0), atol=0.02)
    assert float(ring.checker(ring.centres()).sum()) == pytest.approx(3.0)
    offset, _ = ring.offsets(1.05 * ring.centres())
    assert torch.allclose(offset, torch.full((8,), 0.05 * ring.RADIUS), atol=1e-5)


@pytest.mark.law
def test_edges_are_judged_whatever_their_number() -> None:
    grid = torch.arange(32)
    one, many = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    one[..., 8:16] = 1.0
    many[..., (grid // 8) % 2 == 1] = 1.0
    assert edge_sharpness(many) == pytest.approx(edge_sharpness(one), rel=0.2)
    soft = torch.nn.functional.avg_pool2d(many, 3, 1, 1, count_include_pad=False)
    assert edge_sharpness(soft) < 0.6 * edge_sharpness(many)
    assert math.isnan(edge_sharpness(torch.zeros(1, 3, 32, 32)))
    pair = torch.cat([one, one, one, many])
    assert diversity(pair[:2], 1) == 0 and diversity(pair, 2) > 0
