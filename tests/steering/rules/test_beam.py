"""Beam: the best few survive in equal numbers; populations and importance sampling on a pipeline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from diffplug.plug import plug
from diffplug.steering import Beam, FeynmanKac, ImportanceSampling, Resampling, Scoring
from diffplug.steering.engine.outputs import best_first
from diffplug.steering.smc.resampling import beam
from diffplug.testing import tiny


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


def run(steerer: Any, **options: Any) -> Any:
    """Return the pictures of a short steered call."""
    pipe = tiny("sd15")
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    with plug(pipe, steerer):
        return pipe("a", num_inference_steps=5, output_type="pt", generator=generator, **options).images


@pytest.mark.law
def test_the_best_few_have_equally_many_copies() -> None:
    logw = torch.tensor([[0.0, 3.0, 1.0, 2.0], [-math.inf, 1.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert beam(2)(logw, []).tolist() == [[1, 1, 3, 3], [1, 1, 1, 1]]


@pytest.mark.law
def test_the_best_of_each_population_comes_first() -> None:
    rewards = torch.tensor([1.0, 5.0, 4.0, 2.0, 3.0, -math.inf])
    assert best_first(rewards) == [1, 2, 4, 3, 0, 5]
    assert best_first(rewards, 3) == [1, 2, 4, 3, 0, 5]
    assert best_first(rewards, 2) == [1, 4, 2, 3, 0, 5]


@pytest.mark.pipe
def test_a_beam_keeps_its_width() -> None:
    steerer = Beam(red, particles=6, width=2, scoring=Scoring(at="every"))
    run(steerer)
    for chosen in steerer.report.ancestors[:, 0]:
        assert chosen.unique(return_counts=True)[1].tolist() == [3, 3]
    assert bool(torch.isnan(steerer.report.log_z).all())


@pytest.mark.pipe
def test_populations_give_pictures_without_a_common_ancestor() -> None:
    steerer = FeynmanKac(
        red,
        particles=8,
        strength=5.0,
        selection=Resampling(islands=4, ess_threshold=None),
        scoring=Scoring(at="every"),
    )
    images = run(steerer, num_images_per_prompt=4)
    assert len(images) == 4
    assert sorted(slot // 2 for slot in steerer.report.returned[0]) == [0, 1, 2, 3]
    assert bool((steerer.report.ancestors // 2 == torch.arange(8) // 2).all())


@pytest.mark.pipe
def test_importance_sampling_only_weighs() -> None:
    steerer = ImportanceSampling(red, particles=4, strength=0.7)
    run(steerer)
    report = steerer.report
    assert report.calls == ()
    torch.testing.assert_close(report.final_log_weights, 0.7 * report.final_rewards)
    torch.testing.assert_close(report.log_z, torch.logsumexp(0.7 * report.final_rewards, -1) - math.log(4))


@pytest.mark.law
def test_bad_options_are_refused() -> None:
    for options in ({"width": 3}, {"width": 0}, {"returns": "sample"}, {"score_at": (2.0,)}):
        with pytest.raises(ValueError, match="|".join(options)):
            Beam(red, particles=8, **options)
    with pytest.raises(ValueError, match="islands=3 does not divide particles=8"):
        FeynmanKac(red, particles=8, selection=Resampling(islands=3))
    with pytest.raises(ValueError, match="unknown potential 'maxi'"):
        FeynmanKac(red, potential="maxi")
    assert Beam(red, particles=3).kept == 1


@pytest.mark.law
@pytest.mark.parametrize(("particles", "apart"), [(1, 1), (2, 1), (5, 1), (8, 4)])
def test_particles_go_in_pairs_unless_told_otherwise(particles: int, apart: int) -> None:
    assert FeynmanKac(red, particles=particles).islands == apart
    assert FeynmanKac(red, particles=particles, selection=Resampling(islands=1)).islands == 1
