"""Values: posterior samples, learned ones, and what a filter does with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EulerAncestralDiscreteScheduler

from diffplug.noise.families import Level
from diffplug.pictures import score_pictures
from diffplug.plug import plug
from diffplug.steering import SVDD, FeynmanKac, LearnedValue, ManySamples, Scoring, fit_value
from diffplug.steering.values.many_samples import State
from diffplug.testing import tiny


def state(x0: torch.Tensor, level: Level | None, strength: float, **changes: Any) -> State:
    """Return a state whose reward is the mean of the clean latents."""
    values: dict[str, Any] = {
        "sample": x0,
        "output": x0,
        "x0": x0,
        "level": level,
        "prompts": [""] * len(x0),
        "call": 3,
        "strength": strength,
        "rate": lambda x: x.flatten(1).mean(1).double(),
    }
    return State(**{**values, **changes})


@pytest.mark.law
def test_many_samples_reach_the_soft_value_of_a_gaussian() -> None:
    """r = x, posterior N(x0, v): log E exp(lambda r) / lambda = x0 + lambda v / 2."""
    level, spread, strength = Level(0.6, 0.8), 0.5, 2.0
    v = (spread * 0.8) ** 2 / ((0.6 * spread) ** 2 + 0.8**2)
    x0 = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
    found = ManySamples(draws=4000, spread=spread)(state(x0, level, strength))
    assert found.tolist() == pytest.approx([0.3 + v, 1.0 + v], abs=0.04)
    assert float(found[1] - found[0]) == pytest.approx(0.7, abs=1e-6), "all rows share the noise"


@pytest.mark.law
def test_tokens_are_drawn_where_they_are_open() -> None:
    sample = torch.tensor([[0, 3, 3]])
    output = torch.tensor([[[0.0, 9, 0], [50.0, 0, 0], [0.0, 0, 50.0]]])
    x0 = torch.tensor([[0, 0, 2]])
    seen: list[list[int]] = []

    def rate(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0].tolist())
        return (x == 2).sum(1).double()

    value = ManySamples(draws=3)(state(x0, None, 1.0, sample=sample, output=output, rate=rate))
    assert seen == [[0, 0, 2]] * 3
    assert value.tolist() == pytest.approx([1.0])


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    return 300.0 * images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Return a tiny pipeline with a stochastic solver."""
    built = tiny("sd15")
    built.scheduler = EulerAncestralDiscreteScheduler.from_config(built.scheduler.config)
    return built


@pytest.fixture(scope="module")
def fitted(pipe: Any) -> LearnedValue:
    """Return a value fitted to the tiny pipeline."""
    return fit_value(pipe, red, ["a"], copies=48, steps=150, num_inference_steps=4, output_type="pt")


@pytest.mark.pipe
def test_late_states_of_a_pixel_model_tell_the_reward() -> None:
    value = fit_value(tiny("ddpm"), red, [""], copies=80, steps=300, num_inference_steps=4, output_type="np")
    assert value.card.r2[-1] > 0.5
    assert value.card.r2[-1] > value.card.r2[0] - 0.05


@pytest.mark.pipe
def test_a_fitted_value_steers_without_decoding(pipe: Any, fitted: LearnedValue) -> None:
    assert len(fitted.card.r2) == 4
    calls = []

    def counted(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append(len(images))
        return red(images, prompts)

    steerer = SVDD(counted, particles=4, strength=1.0, scoring=Scoring(value=fitted))
    with plug(pipe, steerer):
        pipe("a", num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(1))
    assert calls == [4], "the reward sees finished pictures only"
    assert torch.isfinite(steerer.report.rewards).all()
    assert float((steerer.report.rewards - fitted.card.mean).abs().max()) < 20 * fitted.card.std


@pytest.mark.pipe
def test_a_value_survives_its_files(fitted: LearnedValue, tmp_path: Path) -> None:
    fitted.save(tmp_path / "value")
    again = LearnedValue.load(tmp_path / "value")
    assert again.card == fitted.card
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = state(x, Level(0.6, 0.8), 1.0)
    assert torch.equal(again(seen), fitted(seen))
    weights = tmp_path / "value" / "value.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="holds no readable value"):
        LearnedValue.load(tmp_path / "value")
    with pytest.raises(ValueError, match="holds no .*value.json"):
        LearnedValue.load(tmp_path)
    with pytest.raises(ValueError, match="fitted to latents of 4 axes and 4 channels"):
        fitted(state(torch.zeros(2, 16, 8), Level(0.6, 0.8), 1.0))


@pytest.mark.pipe
def test_soft_values_lie_above_expected_rewards(pipe: Any, fitted: LearnedValue) -> None:
    soft = fit_value(
        pipe, red, ["a"], copies=48, steps=150, strength=3.0 / fitted.card.std, num_inference_steps=4
    )
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = state(x, Level(0.07, 1.0), 1.0)
    assert float(soft(seen).mean()) > float(fitted(seen).mean())


@pytest.mark.pipe
def test_what_cannot_be_fitted_is_refused(pipe: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    with pytest.raises(ValueError, match="nothing to learn"):
        fit_value(pipe, lambda images, prompts: [0.5] * len(images), ["a"], copies=12, **options)
    with pytest.raises(ValueError, match="4 usable roll-outs are too few"):
        fit_value(pipe, red, ["a"], copies=4, **options)
    with pytest.raises(ValueError, match="a list of at least one text"):
        fit_value(pipe, red, "a")


@pytest.mark.pipe
def test_previews_decode_on_the_way_and_the_end_is_the_pipelines_own(pipe: Any) -> None:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    shapes: list[tuple[int, ...]] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        shapes.append(tuple(images.shape[1:]))
        return red(images, prompts)

    steerer = FeynmanKac(reward, particles=4, scoring=Scoring(preview=vae, at=(0.5,)))
    with plug(pipe, steerer):
        images = pipe("a", num_inference_steps=4, output_type="pt").images
    assert shapes[-1] == tuple(images.shape[1:])
    assert len(shapes) == 2
    with pytest.raises(ValueError, match="give one of them"):
        FeynmanKac(reward, scoring=Scoring(preview=vae, decode=lambda *a, **k: None))
    with pytest.raises(ValueError, match="value=3 cannot be called"):
        FeynmanKac(reward, scoring=Scoring(value=3))


@pytest.mark.law
def test_rewards_run_in_smaller_portions_when_memory_runs_out() -> None:
    sizes: list[int] = []

    def small(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return images.flatten(1).mean(1)

    images = torch.rand(7, 3, 4, 4)
    found = score_pictures(small, images, [""] * 7, takes_video=False)
    torch.testing.assert_close(found, images.flatten(1).mean(1))
    assert sizes == [7, 4, 2, 2, 2, 1]


@pytest.mark.pipe
def test_a_value_of_the_wrong_shape_names_the_step(pipe: Any) -> None:
    steerer = FeynmanKac(red, particles=2, scoring=Scoring(value=lambda state: torch.zeros(5)))
    with plug(pipe, steerer), pytest.raises(ValueError, match=r"value failed at step 2 of 4: .*\(5,\) for 2"):
        pipe("a", num_inference_steps=4, output_type="pt")
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler


@pytest.mark.law
@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 1.5}, {"spread": 0.0}, {"spread": math.inf}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ManySamples(**options)


@pytest.mark.pipe
def test_a_value_that_explains_nothing_says_so() -> None:
    def noise(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.randn(len(images), generator=torch.Generator().manual_seed(len(images)))

    with pytest.warns(UserWarning, match="explains nothing of held-out rewards"):
        fit_value(tiny("sd15"), noise, ["a", "b"], copies=8, steps=40, num_inference_steps=2)
