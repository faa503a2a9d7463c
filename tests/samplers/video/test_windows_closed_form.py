"""What windows do to a video's covariance, against a closed form.

One pixel, 64 frames, stationary Gaussian: covariance a + (1 - a) rho^|i - j| with a = .5 (the scene) and rho
= .9 (the motion). The network is the exact denoiser of 16 frames, a matrix for every noise level; the
product's plan, weights and noise run it inside Diffusers' flow Euler scheduler, 50 steps, shift 3. The wanted
numbers come from propagating covariance matrices through the same steps, without sampling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffplug.plug import plug
from diffplug.samplers.video.network_axes import NETWORKS, Axes
from diffplug.samplers.video.windows import Windows
from diffplug.testing.closed_form.gaussian_video import GaussianVideo

FRAMES, WINDOW = 64, 16


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "LinearDenoiser", Axes())


def moments(x: torch.Tensor) -> dict[str, float]:
    c = np.cov(x.double().numpy(), rowvar=False)
    d = np.sqrt(np.diag(c))
    correlation = c / d / d[:, None]
    lags = {lag: np.diagonal(correlation, lag) for lag in (1, 16)}
    return {
        "least": float(np.diag(c).min()),
        "mean": float(np.diag(c).mean()),
        "lag 1": float(lags[1].min()),
        "lag 16": float(lags[16].mean()),
    }


ROWS = [
    # overlap, weights, noise, least and mean variance, worst lag 1, lag 16
    (0, "flat", "iid", 0.938, 0.940, 0.0, 0.0),
    (4, "flat", "iid", 0.724, 0.795, 0.876, 0.15),
    (4, "pyramid", "iid", 0.746, 0.807, 0.919, 0.15),
    (8, "flat", "iid", 0.685, 0.772, 0.741, 0.15),
    (8, "pyramid", "iid", 0.740, 0.795, 0.914, 0.15),
    (12, "pyramid", "iid", 0.745, 0.781, 0.932, 0.16),
    (12, "pyramid", "free", 0.933, 0.942, 0.947, 0.947),
    (8, "pyramid", "repeat", 0.930, 0.944, 0.942, 0.997),
]


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_fused_windows_have_the_covariance_that_the_closed_form_says(row: tuple[Any, ...]) -> None:
    overlap, weights, noise, least, mean, lag1, lag16 = row
    pipe = GaussianVideo()
    with plug(pipe, Windows(frames=WINDOW, overlap=overlap, weights=weights, noise=noise)):
        found = moments(pipe(num_frames=FRAMES, generator=torch.Generator().manual_seed(0)))
    assert found["least"] == pytest.approx(least, abs=0.02)
    assert found["mean"] == pytest.approx(mean, abs=0.02)
    assert found["lag 1"] == pytest.approx(lag1, abs=0.02)
    assert found["lag 16"] == pytest.approx(lag16, abs=0.03)


@pytest.mark.law
@pytest.mark.slow
def test_the_whole_video_keeps_what_windows_lose() -> None:
    found = moments(GaussianVideo()(num_frames=FRAMES, generator=torch.Generator().manual_seed(0)))
    assert found["mean"] == pytest.approx(0.935, abs=0.02)
    assert found["lag 1"] == pytest.approx(0.957, abs=0.02)
    assert found["lag 16"] == pytest.approx(0.597, abs=0.03)
