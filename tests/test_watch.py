"""A run is watched: its steps are told, and latents or pictures that are no numbers are errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffplug import plug
from diffplug.recipe import Recipe
from diffplug.watch import Watch

pytestmark = pytest.mark.pipe


@pytest.fixture
def pipe() -> Any:
    from diffplug.testing import tiny

    found = tiny("sd15")
    found.set_progress_bar_config(disable=True)
    return found


def _poison(pipe: Any, monkeypatch: pytest.MonkeyPatch, at: int, rows: slice) -> None:
    """The network gives NaN for some rows from its `at`-th call on."""
    forward, calls = pipe.unet.forward, [0]

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        out = forward(*args, **kwargs)
        if calls[0] >= at:
            out[0][rows] = torch.nan
        return out

    monkeypatch.setattr(pipe.unet, "forward", poisoned)


def test_latents_like_nan_stop_the_run_at_their_step(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(pipe, monkeypatch, 2, slice(None))
    steps: list[tuple[int, int]] = []
    with pytest.raises(
        ValueError, match=r"latents are not finite after step 2 \(sigma [\d.]+\): lower --guid"
    ):
        Recipe(sampler="ddim", steps=5).run(pipe, ["a"], [0], on_step=lambda *step: steps.append(step))
    assert steps == [(1, 5)]


def test_a_steerer_may_lose_particles_but_no_picture(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, red_reward: str
) -> None:
    recipe = Recipe(
        sampler="ddim", eta=1.0, steps=3, guidance=1.0, steer="fk", particles=3, reward=red_reward
    )
    _poison(pipe, monkeypatch, 3, slice(0, 1))
    assert len(recipe.run(pipe, ["a", "b"], [0, 1]).images) == 2
    _poison(pipe, monkeypatch, 1, slice(0, 3))
    with pytest.raises(ValueError, match="not finite|every particle|no particle|NaN"):
        recipe.run(pipe, ["a", "b"], [0, 1])


def test_decoded_pictures_like_nan_are_an_error(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipe.vae.decode

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        out = decode(*args, **kwargs)
        out[0][-1] = torch.nan
        return out

    monkeypatch.setattr(pipe.vae, "decode", poisoned)
    with pytest.raises(ValueError, match="1 of 2 decoded pictures are not finite"):
        Recipe(steps=1).run(pipe, ["a", "b"], [0, 1])


def test_an_accelerator_is_not_waited_for(pipe: Any) -> None:
    watch = Watch()
    watch._seen = [("step 1", torch.tensor(False)), ("step 2 (sigma 3.1)", torch.tensor(True))]
    with pytest.raises(ValueError, match="not finite after step 2"):
        watch.finish()
    watch.finish()  # told once


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dc-solver"])
def test_every_step_is_told(pipe: Any, sampler: str) -> None:
    steps: list[tuple[int, int]] = []
    Recipe(sampler=sampler, steps=3).run(pipe, ["a"], [0], on_step=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert {of for _, of in steps} == {len(steps)}


def test_a_watched_run_is_the_same_run(pipe: Any) -> None:
    def run(*plugs: Any) -> np.ndarray:
        with plug(pipe, *plugs):
            generator = torch.Generator().manual_seed(0)
            return pipe("a", num_inference_steps=3, generator=generator, output_type="np").images

    assert np.array_equal(run(), run(Watch()))


def test_a_reward_that_writes_into_its_pictures_spoils_nothing(pipe: Any) -> None:
    from diffplug.steering import BestOfN

    def plain(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def rude(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        value = plain(images, prompts).clone()
        images.zero_()
        return value

    def run(reward: Any) -> np.ndarray:
        with plug(pipe, BestOfN(reward, particles=3)):
            generator = torch.Generator().manual_seed(0)
            return pipe("a", num_inference_steps=2, generator=generator, output_type="np").images

    assert np.array_equal(run(plain), run(rude))
