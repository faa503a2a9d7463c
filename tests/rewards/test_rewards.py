"""What a reward returns becomes n float64 numbers, or an error that names the reward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffplug import rewards
from diffplug.registry import REWARDS

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.float16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([[1], [2], [3]], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor([2.0]), np.float32(3)],
    ],
    ids=["ints", "tuple", "half array", "grad", "column", "mixed"],
)
def test_numbers_of_any_kind(returned: Any) -> None:
    scores = rewards.score(lambda images, prompts: returned, IMAGES, PROMPTS)
    assert scores.dtype == torch.float64 and scores.device.type == "cpu" and not scores.requires_grad
    assert scores.tolist() == [1.0, 2.0, 3.0]


def test_nan_infinity_and_none_stay_visible() -> None:
    scores = rewards.score(lambda images, prompts: [math.nan, -math.inf, None], IMAGES, PROMPTS)
    assert scores.isnan().tolist() == [True, False, True]
    assert scores[1] == -math.inf


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "None"),
        ([1.0, 2.0], "list of length 2"),
        (torch.zeros(3, 2), r"Tensor of shape \(3, 2\)"),
        (np.zeros(()), r"ndarray of shape \(\)"),
        (["x", "y", "z"], "texts, as 'x'"),
        ([[1], [2, 3], [4]], "list of length 3"),
        (torch.zeros(3, dtype=torch.complex64), "Tensor"),
    ],
)
def test_anything_else_is_refused_by_name(returned: Any, told: str) -> None:
    def my_reward(images: torch.Tensor, prompts: list[str]) -> Any:
        return returned

    with pytest.raises(
        ValueError, match=f"reward my_reward must return 3 numbers for 3 images, it returned {told}"
    ):
        rewards.score(my_reward, IMAGES, PROMPTS)


def test_one_prompt_for_each_image() -> None:
    with pytest.raises(ValueError, match="3 images and 1 prompts"):
        rewards.score(lambda images, prompts: [0.0] * 3, IMAGES, ["a"])


def test_names_lead_to_ready_rewards() -> None:
    class Scaled:
        def __init__(self, factor: float = 1.0) -> None:
            self.factor = factor

        def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return self.factor * images.mean((1, 2, 3))

    def mean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    REWARDS.register("test-scaled", Scaled)
    REWARDS.register("test-mean", mean)
    try:
        assert {"test-scaled", "test-mean"} <= set(rewards.names())
        twice = rewards.score(rewards.get("test-scaled", factor=2.0), IMAGES, PROMPTS)
        assert torch.allclose(twice, 2 * rewards.score(rewards.get("test-mean"), IMAGES, PROMPTS))
        with pytest.raises(ValueError, match="is a function and takes no options, got factor"):
            rewards.get("test-mean", factor=2.0)
    finally:
        REWARDS.unregister("test-scaled")
        REWARDS.unregister("test-mean")


def test_unknown_reward() -> None:
    with pytest.raises(ValueError, match="unknown reward 'shape'. Did you mean 'shapes'"):
        rewards.get("shape")
