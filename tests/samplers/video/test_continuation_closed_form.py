"""What continuation does to a video's covariance and to its mean, against closed forms.

The model is the exact conditional law of a clip given its first p frames, for the Gaussian video of
`test_windows_closed_form`; every pixel of a frame is an independent draw, so one long video holds 19,200.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffplug.samplers.video.long_video import LongVideo
from diffplug.testing.closed_form.gaussian_video import ExactContinuation, covariance

FRAMES, WINDOW = 64, 16


ROWS = [
    # overlap, correlations at lags 8, 16, 32, 48
    (1, 0.706, 0.536, 0.312, 0.182),
    (4, 0.712, 0.551, 0.330, 0.199),
    (8, 0.715, 0.570, 0.359, 0.226),
]


@pytest.mark.law
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"p={row[0]}")
def test_continuation_is_exact_at_every_join_and_forgets_geometrically(row: tuple[float, ...]) -> None:
    overlap, *wanted = row
    long = LongVideo(
        None, frames=FRAMES, clip_frames=WINDOW, overlap=int(overlap), hand_over=ExactContinuation()
    )
    x = long(seed=1).frames.reshape(FRAMES, -1).double().numpy()
    correlation = np.corrcoef(x)
    assert np.var(x, axis=1) == pytest.approx(np.ones(FRAMES), abs=0.06)
    assert np.diagonal(correlation, 1).min() == pytest.approx(0.950, abs=0.01)
    for lag, value in zip((8, 16, 32, 48), wanted, strict=True):
        assert np.diagonal(correlation, lag).mean() == pytest.approx(value, abs=0.03)


def limit_of_bias(overlap: int, bias: float) -> float:
    """The last frame of the fixed point u = G (u + b); G: a clip's tail given its prefix."""
    c = covariance(WINDOW)
    gain = torch.linalg.solve(c[:overlap, :overlap], c[:overlap, -overlap:]).T
    rest = torch.eye(overlap, dtype=torch.float64) - gain
    return float(torch.linalg.solve(rest, gain.sum(1) * bias)[-1])


@pytest.mark.law
@pytest.mark.parametrize("overlap", [1, 4, 8])
def test_a_biased_hand_over_drifts_further_the_longer_the_prefix(overlap: int) -> None:
    long = LongVideo(
        None, frames=600, clip_frames=WINDOW, overlap=overlap, hand_over=ExactContinuation(bias=0.1)
    )
    ends = torch.stack([*long.frames(seed=2)]).flatten(1).mean(1)
    last = range(300 // (WINDOW - overlap) * (WINDOW - overlap) + WINDOW - 1, 600, WINDOW - overlap)
    assert float(ends[list(last)].mean()) == pytest.approx(limit_of_bias(overlap, 0.1), abs=0.02)


@pytest.mark.law
def test_overlap_is_no_cure_for_a_bias() -> None:
    limits = [limit_of_bias(overlap, 0.1) for overlap in (1, 4, 8)]
    assert limits[0] == pytest.approx(0.152, abs=0.001)
    assert limits[0] < limits[1] < limits[2]
