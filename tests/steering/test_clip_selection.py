"""Selection clip by clip: weights against a closed form, and what rewards are asked."""

from __future__ import annotations

import math

import pytest
import torch

from diffplug.rewards import get
from diffplug.rewards.compose import Weighted
from diffplug.steering import ClipSelection
from diffplug.steering.clips import ClipWeights
from diffplug.video.statistics import clip_statistics


def chains(n: int, candidates: int, *, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states and log weights of n chains x_k = .8 x_{k-1} + .6 z; the value is the posterior mean."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 7, candidates, generator=generator, dtype=torch.float64)
    uniform = torch.rand(n, 7, generator=generator, dtype=torch.float64)
    states, weights = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        chain, x = ClipWeights(strength), 0.0
        for k in range(7):
            drawn = noise[i, k] if k == 0 else 0.8 * x + 0.6 * noise[i, k]
            kept = chain.select((0.8 ** (6 - k) * drawn).tolist(), float(uniform[i, k]))
            x = float(drawn[kept])
        states[i], weights[i] = x, chain.log_weight
    return states, weights


@pytest.mark.law
@pytest.mark.parametrize("candidates", [2, 4])
def test_weights_are_unbiased_for_the_chained_sampler(candidates: int) -> None:
    """Z = E exp(x_6) = exp(1/2), and the tilted mean is 1; four standard errors."""
    n = 2000
    states, weights = chains(n, candidates)
    z = weights.exp() / math.exp(0.5)
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / math.sqrt(n)
    ratio = z * (states - 1)
    assert abs(float(ratio.mean())) < 4 * float(ratio.std()) / math.sqrt(n)
    assert float(states.mean()) < 0.85  # survivors without weights are not there yet


@pytest.mark.law
def test_without_strength_nothing_is_selected_and_nothing_weighs() -> None:
    chain = ClipWeights(0.0)
    counts = [chain.select([5.0, -3.0], u) for u in (0.1, 0.4, 0.6, 0.9)]
    assert counts == [0, 0, 1, 1]
    assert chain.log_weight == 0.0


def test_greedy_takes_the_best_and_has_no_weight() -> None:
    chain = ClipWeights(1.0, greedy=True)
    assert chain.select([0.1, 0.7, float("nan")], 0.0) == 1
    assert chain.log_weight is None


def test_a_clip_rated_nan_never_survives_and_all_of_them_are_refused() -> None:
    chain = ClipWeights(1.0)
    assert {chain.select([float("nan"), 0.0], u) for u in (0.0, 0.3, 0.99)} == {1}
    with pytest.raises(ValueError, match="nothing is left"):
        chain.select([float("nan")] * 2, 0.5)


def test_values_are_means_over_the_clips_so_far() -> None:
    selection = ClipSelection(lambda x, texts: x.mean((1, 2, 3)), candidates=2, rule="greedy")
    grey = [torch.full((3, 3, 4, 4), v) for v in (0.2, 0.6)]
    assert selection.choose(grey, "", 0)[0] == 1
    kept, found = selection.choose(grey, "", 1)
    assert (kept, found) == (1, pytest.approx([0.2, 0.6]))
    state = selection.state()
    assert state["clips"] == 2
    assert state["sum"] == pytest.approx(1.2)


def test_steady_prefers_the_clip_with_the_colours_of_the_first() -> None:
    first = torch.rand(4, 3, 8, 8)
    steady = get("steady").anchored(first)
    scores = steady(torch.stack([first, first * 0.8, first * 0.5]), [""] * 3)
    assert scores[0] == 0
    assert scores[0] > scores[1] > scores[2]
    assert steady.anchor == clip_statistics(first)
    rising = torch.stack([first[0] * s for s in (0.2, 0.4, 0.6, 0.8)])
    assert get("steady")(torch.stack([first, rising]), [""] * 2)[1] < -0.1
    with pytest.raises(ValueError, match="single picture"):
        steady(first, [""] * 4)


def test_steady_can_be_added_to_a_reward_of_pictures() -> None:
    both = get("0.5*sharpness + 2*steady")
    assert isinstance(both, Weighted)
    assert both.takes_video
    clips = torch.rand(2, 4, 3, 8, 8)
    told = both.anchored(clips[0])
    sharp = torch.stack([get("sharpness")(clip, [""] * 4).mean() for clip in clips])
    steady = get("steady").anchored(clips[0])(clips, [""] * 2)
    assert torch.allclose(told(clips, ["", ""]), 0.5 * sharp + 2 * steady)
    assert told(clips, ["", ""])[0] == pytest.approx(float(0.5 * sharp[0]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reward": "steady", "candidates": 1}, "selects nothing"),
        ({"reward": "steady", "candidates": 0}, "candidates=0"),
        ({"reward": "steady", "rule": "best"}, "greedy"),
        ({"reward": "steady", "strength": -1.0}, "at least 0"),
        ({"reward": "stedy"}, "steady"),
        ({"reward": 3}, "give a reward"),
    ],
)
def test_bad_selections_are_refused_at_once(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ClipSelection(**options)  # type: ignore[arg-type]


def test_a_strength_that_greedy_choice_would_ignore_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength=3.0 does nothing with rule='greedy'"):
        ClipSelection("steady", candidates=2, rule="greedy", strength=3.0)
