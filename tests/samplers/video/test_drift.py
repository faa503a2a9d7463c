"""Statistics of clips and joins, and what a report calls a runaway."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffplug.samplers.video.drift import DriftReport
from diffplug.samplers.video.seams import faded, matched
from diffplug.video.statistics import Join, clip_statistics, distance, jump_ratio, psnr, slope


def clip(shift: float = 0.0, frames: int = 6, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(frames, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 0.3 + shift + 0.1 * noise


@pytest.mark.law
def test_statistics_are_what_they_say() -> None:
    x = torch.zeros(3, 3, 6, 6)
    x[:, 0] = 0.5
    x[1] += 0.25
    found = clip_statistics(x)
    assert found.mean == pytest.approx((0.5 + 0.25 / 3, 0.25 / 3, 0.25 / 3))
    assert found.saturation == pytest.approx(0.5)
    assert found.motion == pytest.approx(0.25)
    assert found.sharpness == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(clip_statistics(x[:1]).motion)
    assert distance(found, found) == 0
    brighter = clip_statistics(x + 0.1)
    assert distance(found, brighter) == pytest.approx(0.1 * math.sqrt(3 / 7))


@pytest.mark.law
def test_psnr_and_jumps() -> None:
    x = clip()
    assert psnr(x, x) == math.inf
    assert psnr(x, x + 0.1) == pytest.approx(20)
    line = torch.arange(6.0)[:, None, None, None].expand(6, 3, 4, 4) / 10
    assert jump_ratio(line[0], line[1:]) == pytest.approx(1)
    assert jump_ratio(line[0], line[3:]) == pytest.approx(3)
    still = torch.zeros(4, 3, 4, 4)
    assert math.isnan(jump_ratio(still[0], still))
    assert jump_ratio(still[0] + 1, still) == math.inf


@pytest.mark.law
def test_a_slope_and_its_error() -> None:
    assert slope([1.0, 3.0, 5.0, 7.0]) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    found, error = slope([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert abs(found) < 2 * error
    assert math.isnan(slope([1.0, 2.0])[0])


@pytest.mark.law
def test_matching_brings_means_and_deviations_together() -> None:
    one, two = clip(), clip(0.2, seed=1) * 1.1
    have, want = clip_statistics(two), clip_statistics(one)
    found = clip_statistics(matched(two, have, want))
    assert found.mean == pytest.approx(want.mean, abs=1e-5)
    assert found.std == pytest.approx(want.std, abs=1e-5)
    half = clip_statistics(matched(two, have, want, 0.5))
    assert half.level == pytest.approx((have.level + want.level) / 2, abs=1e-5)
    flat = torch.full((2, 3, 4, 4), 0.5)
    assert clip_statistics(matched(flat, clip_statistics(flat), want)).level == pytest.approx(want.level)


@pytest.mark.law
def test_a_fade_goes_from_one_to_the_other() -> None:
    zero, one = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    assert faded(zero, one)[:, 0, 0, 0].tolist() == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.law
def test_reports_tell_a_runaway_from_wobble_and_name_stagnation() -> None:
    rising = DriftReport(clips=tuple(clip_statistics(clip(0.02 * k, seed=k)) for k in range(8)))
    assert "level" in rising.runaway
    assert "level changes steadily" in str(rising)
    wobble = DriftReport(clips=tuple(clip_statistics(clip(0.02 * (-1) ** k, seed=k)) for k in range(8)))
    assert wobble.runaway == ()
    assert not wobble.stagnant
    calm = [clip() * (1 - 0.1 * k) + 0.3 * 0.1 * k for k in range(8)]
    assert DriftReport(clips=tuple(map(clip_statistics, calm))).stagnant


@pytest.mark.law
def test_a_report_survives_json() -> None:
    report = DriftReport(
        clips=(clip_statistics(clip()), clip_statistics(clip(frames=1))),
        joins=(Join(6, math.inf, math.nan), Join(11, 30.0, 1.5)),
        seconds=(1.0, 2.0),
        rewards=((0.1, 0.2),),
        log_weight=0.3,
    )
    text = json.dumps(report.as_mapping(), allow_nan=False)
    again = DriftReport.from_mapping(json.loads(text))
    assert str(again) == str(report)
    assert again.joins[0].seam == math.inf
