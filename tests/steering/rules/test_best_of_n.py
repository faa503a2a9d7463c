"""Best of n is the plain pipeline plus a choice at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug.plug import plug
from diffplug.seeds import Seeds, generators, particle_seed
from diffplug.steering import BestOfN, Network, Ranks, Scoring
from diffplug.testing import tiny


def dark(images: torch.Tensor, prompts: list[str]) -> list[float]:
    """Return minus the mean brightness."""
    return [-float(image.mean()) for image in images]


@pytest.mark.pipe
def test_the_best_free_picture_comes_back_with_a_deterministic_solver() -> None:
    pipe = tiny("sd15")
    given = tiny.inputs("sd15")
    plain = pipe(**given, num_images_per_prompt=4, generator=torch.Generator().manual_seed(1)).images
    steerer = BestOfN(dark, particles=4)
    with plug(pipe, steerer):
        best = pipe(**given, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(best[0], plain[int(torch.tensor(dark(plain, [])).argmax())])
    assert steerer.report.calls == ()
    assert steerer.report.final_log_weights.tolist() == [[0.0] * 4]
    assert steerer.report.network_calls == 2


@pytest.mark.pipe
def test_another_schedule_in_the_middle_is_steered_too() -> None:
    """The steerer stands at the scheduler that the pipeline has when it is called."""
    pipe = tiny("sd15")
    steerer = BestOfN(dark, particles=2)
    with plug(pipe, steerer):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        assert len(pipe(**tiny.inputs("sd15")).images) == 1
    assert steerer.report.steps == 2


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="returns='sample' would ignore the reward"):
        BestOfN(dark, returns="sample")
    with pytest.raises(ValueError, match="particles=0"):
        BestOfN(dark, particles=0)


# ---- an early end


def bands(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return a reward with few values, so that there are ties."""
    shade = images.mean((1, 2, 3)) + 0.3 * images[:, 0].mean((1, 2))
    return torch.floor(shade * 200) / 4


def pictures(pipe: Any, steerer: Any, prompt: Any = ("a", "b", "c"), **options: Any) -> torch.Tensor:
    """Return what a short seeded call hands back."""
    given = {"num_inference_steps": 2, "output_type": "pt", **options}
    with plug(pipe, Seeds([5, 6, 7][: len(prompt)]), steerer):
        return pipe(list(prompt), **given).images


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny("sd15")


@pytest.fixture(scope="module")
def pool(pipe: Any) -> Any:
    """Return rewards [3, 6] and pictures [18] of the full pool, prompt by prompt."""
    steerer = BestOfN(bands, particles=6, returns="all")
    images = pictures(pipe, steerer)
    return steerer.report.final_rewards, images


@pytest.mark.law
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("reached_by", ["all", "one"])
def test_portions_are_the_first_draws_of_the_full_pool(
    pipe: Any, pool: Any, batch: int, reached_by: str
) -> None:
    rewards, images = pool
    enough = float(rewards.max() if reached_by == "one" else rewards.amax(1).min())
    steerer = BestOfN(bands, particles=6, batch=batch, enough=enough)
    found = pictures(pipe, steerer)
    report = steerer.report
    for g in range(3):
        reached = torch.nonzero(rewards[g] >= enough).reshape(-1).tolist()
        used = min(-(-(reached[0] + 1) // batch) * batch, 6) if reached else 6
        assert report.draws[g] == used
        assert torch.equal(report.final_rewards[g, :used], rewards[g, :used])
        assert bool(report.final_rewards[g, used:].isnan().all())
        slot = int(rewards[g, :used].argmax())  # the first of equals
        assert reached_by == "all" or slot == int(rewards[g].argmax()), "not what the full pool hands back"
        assert report.returned[g] == (slot,)
        torch.testing.assert_close(found[g], images[6 * g + slot], atol=1e-4, rtol=0)
    assert report.network_rows == 2 * 2 * sum(report.draws)


@pytest.mark.law
def test_several_pictures_of_a_prompt_wait_for_as_many(pipe: Any, pool: Any) -> None:
    rewards, _ = pool
    second = float(rewards[0].sort(descending=True).values[1])
    given = {"num_inference_steps": 2, "output_type": "pt", "num_images_per_prompt": 2}
    row_seeds = [particle_seed(5, slot) for slot in range(6)]
    steerer = BestOfN(bands, particles=6, enough=second)
    with plug(pipe, steerer):
        assert len(pipe("a", **given, generator=generators(row_seeds)).images) == 2
    report = steerer.report
    at = torch.nonzero(rewards[0] >= second).reshape(-1)[1]
    assert report.draws == (max(int(at) + 1, 2),) and len(report.returned[0]) == 2


@pytest.mark.pipe
def test_time_ends_drawing_after_a_portion(pipe: Any) -> None:
    steerer = BestOfN(bands, particles=6, batch=2, seconds=1e-6)
    assert len(pictures(pipe, steerer)) == 3
    assert steerer.report.draws == (2, 2, 2)


@pytest.mark.pipe
def test_ties_and_the_judge_are_reported(pipe: Any, pool: Any) -> None:
    rewards, _ = pool
    steerer = BestOfN(bands, particles=6, judge=dark)
    pictures(pipe, steerer)
    report = steerer.report
    assert report.ties == tuple(int((row == row.max()).sum()) for row in rewards)
    assert report.judge_rewards.shape == (3, 6) and report.to_dict()["ties"] == list(report.ties)
    assert "the judge gives the chosen one" in str(report) and report.draws == ()
    early = BestOfN(bands, particles=6, batch=2, enough=-9.0, judge=dark)
    pictures(pipe, early)
    torch.testing.assert_close(early.report.judge_rewards[:, :2], report.judge_rewards[:, :2])
    assert "2 of 6 drawn" in str(early.report)


@pytest.mark.pipe
@pytest.mark.parametrize("family", ["flux", "ddpm", "pixart"])
def test_families_end_early(family: str) -> None:
    other = tiny(family)
    steerer = BestOfN(dark, particles=3, enough=-9.0)
    with plug(other, steerer):
        assert len(other(**tiny.inputs(family))[0]) == 1
    assert steerer.report.draws == (1,)


@pytest.mark.pipe
def test_embeddings_and_given_latents_go_with_their_prompts(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    size = pipe.unet.config.cross_attention_dim
    embeds = torch.randn(2, 77, size, generator=generator)
    latents = torch.randn(2 * 4, pipe.unet.config.in_channels, 8, 8, generator=generator)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "latents": latents}
    scoring = Scoring(prompts=["one", "two"])
    calls = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    full = BestOfN(bands, particles=4, returns="all", scoring=scoring)
    with plug(pipe, full):
        pipe(**given, **calls)
    rewards = full.report.final_rewards
    early = BestOfN(bands, particles=4, enough=float(rewards[1].max()), scoring=scoring)
    with plug(pipe, early):
        pipe(**given, **calls)
    for g, used in enumerate(early.report.draws):
        assert torch.equal(early.report.final_rewards[g, :used], rewards[g, :used])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 2}, "batch=2 draws in portions, which only an early end needs"),
        ({"batch": 9, "enough": 1.0}, "batch=9 is more than particles=8"),
        ({"batch": 0, "enough": 1.0}, "batch=0: it must be a whole number"),
        ({"enough": "good"}, "enough='good': it must be a number"),
        ({"enough": float("nan")}, "enough=nan: give a finite number"),
        ({"seconds": 0}, "seconds=0: give a time above 0"),
        ({"enough": 1.0, "returns": "all"}, "returns='all' with an early end"),
        ({"enough": 1.0, "network": Network(ranks=Ranks(0, 2))}, "an early end runs in one process"),
        ({"judge": 3}, "judge=3 cannot be called"),
        ({"judge": "shapse"}, "unknown reward 'shapse'. Did you mean 'shapes'"),
    ],
)
def test_early_ends_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BestOfN(dark, **options)


def test_an_early_end_that_cannot_come_is_refused() -> None:
    from diffplug.steering import NoiseSearch

    for rule in (BestOfN, NoiseSearch):
        with pytest.raises(ValueError, match="would never be reached: this reward is at most 1"):
            rule("shapes", particles=2, enough=1.5)
        rule("shapes", particles=2, enough=1.0)
