"""Training of the Moving Shapes model: data, loss, and a run that goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffplug.loading import load
from diffplug.shapes.moving.model import transformer
from diffplug.training.shapes.loop import Loop
from diffplug.training.shapes.moving import (
    Clips,
    MovingRecipe,
    encode_clips,
    flow_loss,
    train_moving,
)

RECIPE = MovingRecipe(steps=3, batch=2, scenes=4, long_every=100)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    return encode_clips(load("shapes").vae, RECIPE, tmp_path_factory.mktemp("latents"), part=2)


@pytest.mark.pipe
def test_clips_are_encoded_once_and_normalised(clips: Clips, tmp_path: Path) -> None:
    assert clips.latents.shape == (4, 97, 4, 16, 16)
    assert 0.5 < float(clips.latents.float().std()) < 2
    encode_clips(load("shapes").vae, RECIPE, tmp_path, part=2)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = encode_clips(load("shapes").vae, RECIPE, tmp_path, part=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    assert torch.equal(again.latents, clips.latents)
    fewer = encode_clips(load("shapes").vae, replace(RECIPE, scenes=3), tmp_path, part=2)
    other = encode_clips(load("shapes").vae, replace(RECIPE, scenes=2, seed=1), tmp_path, part=2)
    assert torch.equal(fewer.latents, clips.latents[:3]) and not torch.equal(
        other.latents, clips.latents[:2]
    )  # a folder that several recipes share gives each its own


def test_batches_are_a_function_of_the_step(clips: Clips) -> None:
    one, two = (clips.draw(np.random.default_rng(3), 6, 16, RECIPE) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert one[2] == two[2]
    assert set(one[1].sum(1).tolist()) <= {0.0, 1.0, 4.0}
    shapes = {RECIPE.shape_of(step, np.random.default_rng(step)) for step in range(10)}
    assert shapes == {(16, 2), (8, 4)}
    assert MovingRecipe().shape_of(4, np.random.default_rng(0))[0] > 16


@pytest.mark.law
def test_the_loss_of_the_clean_latents_is_zero_and_known_frames_are_shown(clips: Clips) -> None:
    x0, known, _ = clips.draw(np.random.default_rng(0), 4, 8, RECIPE)
    seen: list[torch.Tensor] = []

    def oracle(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, return_dict: bool) -> tuple:
        seen.append(x)
        return (x0,)

    torch.manual_seed(0)
    loss, log = flow_loss(oracle, x0, known, torch.zeros(4, 32, 128), blur=0.0)
    assert float(loss) == 0
    assert float(log["unknown"]) == 0
    given = known[:, None, :, None, None].bool().expand_as(x0)
    assert torch.equal(seen[0][:, 4:8][given], x0[given])
    assert torch.equal(seen[0][:, 8, :, 0, 0], known)


@pytest.mark.pipe
def test_a_stopped_run_goes_on_to_the_same_weights(clips: Clips, tmp_path: Path) -> None:
    pipe = load("shapes")

    def run(folder: Path, minutes: float | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = transformer()
        loop = Loop(folder, cpu=True, minutes=minutes, save_every=2)
        return train_moving(RECIPE, loop, clips, network, pipe).state_dict()

    whole = run(tmp_path / "whole", None)
    first = run(tmp_path / "stopped", 0.0)  # saved after one update
    again = run(tmp_path / "stopped", None)
    assert any(not torch.equal(first[name], value) for name, value in whole.items())
    assert all(torch.equal(again[name], value) for name, value in whole.items())
