"""Tests never reach for the network; a small reward and a small saved pipeline for those that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved tiny Stable Diffusion pipeline; read it, never write into it."""
    from diffplug.testing import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny("sd15").save_pretrained(folder)
    return folder


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward: the mean of the red channel."""
    return images[:, 0].mean((1, 2))


@pytest.fixture
def red_reward() -> Iterator[str]:
    """The name under which `redness` is registered while the test runs."""
    from diffplug.registry import REWARDS

    REWARDS.register("test-red", redness)
    yield "test-red"
    REWARDS.unregister("test-red")


@pytest.fixture
def as_loud_as_before() -> Iterator[None]:
    """Commands hush the libraries for their process; tests share theirs with others."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = ours.get_verbosity(), theirs.get_verbosity()
    yield
    for logging, level in zip((ours, theirs), before, strict=True):
        logging.set_verbosity(level)
        logging.enable_progress_bar()
