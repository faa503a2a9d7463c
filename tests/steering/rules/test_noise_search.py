"""Noise search: rounds of start noise around the best so far, for deterministic solvers too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.steering import BestOfN, NoiseSearch
from diffplug.steering.rules.noise_search import _Best
from diffplug.testing import tiny


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Return a tiny pipeline with a deterministic solver."""
    built = tiny("sd15")
    built.scheduler = DDIMScheduler.from_config(built.scheduler.config)
    return built


def run(pipe: Any, *plugs: Any, prompt: Any = ("a", "b"), **options: Any) -> torch.Tensor:
    """Return the pictures of a short steered call."""
    common: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    if not any(isinstance(one, Seeds) for one in plugs):
        common["generator"] = torch.Generator().manual_seed(0)
    with plug(pipe, *plugs):
        return pipe(list(prompt), **{**common, **options}).images


@pytest.mark.pipe
@pytest.mark.parametrize("search", ["zero-order", "random"])
def test_more_rounds_are_never_worse(pipe: Any, search: str) -> None:
    best = [float(red(image[None], [])) for image in run(pipe, BestOfN(red, particles=3))]
    steerer = NoiseSearch(red, particles=3, rounds=4, search=search)
    images = run(pipe, steerer)
    report = steerer.report
    assert len(images) == 2
    assert report.rewards.shape == (4, 2, 3)
    assert report.network_calls == 12
    assert report.calls == (0, 1, 2, 3)
    found = red(images, [])
    torch.testing.assert_close(found.double(), report.rewards.amax((0, 2)))
    assert all(float(now) >= before - 1e-3 for now, before in zip(found, best, strict=True))
    assert float(found.sum()) > sum(best)


@pytest.mark.pipe
def test_one_round_is_best_of_n(pipe: Any) -> None:
    assert torch.equal(
        run(pipe, NoiseSearch(red, particles=3, rounds=1)), run(pipe, BestOfN(red, particles=3))
    )


@pytest.mark.pipe
def test_it_works_with_seeds_and_families(pipe: Any) -> None:
    first, second = (run(pipe, Seeds(4), NoiseSearch(red, particles=2, rounds=3)) for _ in range(2))
    assert torch.equal(first, second)
    flux = tiny("flux")
    steerer = NoiseSearch(red, particles=2, rounds=2)
    with plug(flux, steerer):
        flux(**tiny.inputs("flux", generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(steerer.report.rewards[0], steerer.report.rewards[1])


@pytest.mark.law
def test_every_slot_keeps_its_best() -> None:
    old = _Best((torch.tensor([[1.0], [2.0]]), None), torch.zeros(2, 1), torch.tensor([[1.0, -torch.inf]]))
    new = _Best((torch.tensor([[3.0], [4.0]]), None), torch.ones(2, 1), torch.tensor([[1.0, 0.0]]))
    kept = old.improved(new)
    assert kept.output[0].tolist() == [[1.0], [4.0]]
    assert kept.noise.tolist() == [[0.0], [1.0]]
    assert kept.improving.tolist() == [False]


@pytest.mark.pipe
def test_what_has_no_start_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="does not start from given latents: use BestOfN"):
        NoiseSearch(red).attach(tiny("sd15-img2img"))
    for options in ({"rounds": 0}, {"radius": 0.0}, {"search": "deep"}, {"returns": "sample"}):
        with pytest.raises(ValueError, match="|".join(options)):
            NoiseSearch(red, **options)


@pytest.mark.law
@pytest.mark.parametrize("search", ["zero-order", "random"])
def test_prompts_that_are_done_are_left_out_and_the_others_go_on_alike(pipe: Any, search: str) -> None:
    full = NoiseSearch(red, particles=2, rounds=4, search=search, returns="all")
    run(pipe, Seeds([4, 9]), full)
    rewards = full.report.rewards  # [4, 2, 2]
    ahead = int(rewards.amax((0, 2)).argmax())  # the prompt that gets highest, and what the other never gets
    enough = float((rewards[:, 1 - ahead].max() + rewards[:, ahead].max()) / 2)
    reached = int(torch.nonzero(rewards[:, ahead].amax(-1) >= enough)[0])
    assert reached < 3, "the search improves until its end: nothing is left out"
    early = NoiseSearch(red, particles=2, rounds=4, search=search, enough=enough, judge=red)
    images = run(pipe, Seeds([4, 9]), early)
    report = early.report
    assert (report.draws[ahead], report.draws[1 - ahead]) == (2 * (reached + 1), 8)
    assert bool(report.rewards[-1, ahead].isnan().all())
    kept = rewards[:, 1 - ahead].amax()
    torch.testing.assert_close(report.rewards[:, 1 - ahead], rewards[:, 1 - ahead], atol=0.2, rtol=0)
    torch.testing.assert_close(red(images, [])[1 - ahead].double(), kept, atol=0.2, rtol=0)
    torch.testing.assert_close(report.judge_rewards, report.final_rewards)
    assert float(red(images, [])[ahead]) >= enough - 0.2


def test_ends_are_checked() -> None:
    for options, message in (
        ({"enough": float("inf")}, "enough=inf"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"judge": 1}, "judge=1 cannot be called"),
    ):
        with pytest.raises(ValueError, match=message):
            NoiseSearch(red, **options)
