"""Islands: apart they are separate filters; on a second level the normaliser stays unbiased."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.steering.chain import steer
from diffplug.steering.engine.score_times import every_call
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import one_survivor, the_best
from diffplug.testing.closed_form.chain import GAUSSIAN, TWO_HUMPS

pytestmark = pytest.mark.law

Z_GAUSSIAN, Z_HUMPS = 10.2877135, 2.3410407


def build(groups: int, count: int, size: int, strength: float = 2.0, **options: Any) -> Islands:
    """Return P groups of `count` populations of `size`, with one stream for each population."""
    tilt, second = options.pop("tilt", "constant"), options.pop("second", None)
    generators = options.pop("generators", None) or [torch.Generator().manual_seed(7)]
    inner = ParticleFilter(
        groups=groups * count,
        particles=size,
        potential=Difference(strength=strength, tilt=tilt),
        generators=generators,
        **{"resampler": one_survivor, **options},
    )
    above = [torch.Generator().manual_seed(100)]
    return Islands(inner, groups=groups, generators=above, ess_threshold=second)


def test_populations_apart_are_separate_filters() -> None:
    streams = [torch.Generator().manual_seed(g) for g in range(4)]
    together = build(2, 2, 3, generators=streams, resampler="systematic")
    alone = [
        ParticleFilter(
            groups=1,
            particles=3,
            potential=Difference(strength=2.0, tilt="constant"),
            generators=[torch.Generator().manual_seed(g)],
        )
        for g in range(4)
    ]
    generator = torch.Generator().manual_seed(5)
    for call in range(4):
        scores = torch.randn(12, dtype=torch.float64, generator=generator)
        chosen = together.select(scores, call=call, progress=1.0)
        for g, filt in enumerate(alone):
            single = filt.select(scores[3 * g : 3 * g + 3], call=call, progress=1.0)
            block = chosen.ancestors.reshape(4, 3)[g] - 3 * (g % 2)
            assert torch.equal(single.ancestors[0], block)
    final = torch.randn(12, dtype=torch.float64, generator=generator)
    expected = torch.cat([filt.finish(final[3 * g : 3 * g + 3])[1] for g, filt in enumerate(alone)])
    logw, log_z, _ = together.finish(final)
    torch.testing.assert_close(log_z.exp(), expected.exp().reshape(2, 2).mean(-1))
    assert logw.shape == (2, 6)


def test_a_second_level_moves_whole_populations() -> None:
    filt = build(1, 2, 2, strength=1.0, second=1.0)
    chosen = filt.select(torch.tensor([0.0, 0.0, 30.0, 30.0]), call=0, progress=1.0)
    assert chosen.ancestors.tolist() == [[2, 3, 2, 3]]
    assert chosen.resampled.tolist() == [True]
    assert chosen.distinct_roots.tolist() == [2]
    assert float(filt.log_z[0]) == pytest.approx(30.0 - 0.6931, abs=1e-3)


@pytest.mark.parametrize(
    ("data", "z", "strength", "tilt", "spread", "target"),
    [
        (GAUSSIAN, Z_GAUSSIAN, 2.0, "constant", 0.215, 1.3321),
        (GAUSSIAN, Z_GAUSSIAN, 2.0, "rising", 0.240, 1.3321),
        (TWO_HUMPS, Z_HUMPS, 1.0, "rising", 0.499, 1.9505),
    ],
)
def test_two_levels_are_exact(
    data: Any, z: float, strength: float, tilt: str, spread: float, target: float
) -> None:
    run = steer(
        data,
        lambda x: x,
        strength=strength,
        groups=1500,
        particles=16,
        plan=every_call,
        make_filter=lambda groups: build(groups, 4, 4, strength, tilt=tilt, second=0.5),
    )
    ratio, error, sd = run.ratio(z)
    assert abs(ratio - 1) < 4 * error
    assert sd == pytest.approx(spread, rel=0.25)
    weights = torch.softmax(run.logw, -1) * run.log_z.exp()[:, None]
    pooled = float((weights * run.x).sum() / weights.sum())
    assert pooled == pytest.approx(target, abs=0.04)


def test_greedy_populations_have_no_second_level() -> None:
    with pytest.raises(ValueError, match="no weights to be selected by"):
        build(1, 2, 2, resampler=the_best, second=0.5)
    with pytest.raises(ValueError, match="5 islands cannot be split among 2 prompts"):
        Islands(build(5, 1, 2).inner, groups=2, generators=[])
