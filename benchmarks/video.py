"""What windows, continuation and picture-first selection do to a video: closed form, memory, Moving Shapes.

    python -m benchmarks.video                       # all, benchmarks/results/video.json
    python -m benchmarks.video --only closed-form    # or weights, memory, schemes, chain
    python -m benchmarks.video --plot docs/video.png
    python -m benchmarks.video --animation docs/moving_shapes.webp

Every part writes its figures when it is done, and leaves those of other parts alone.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import command
from benchmarks.video_plot import plot
from benchmarks.video_shapes import chain_figures, draw, scheme_figures
from diffplug.files import read_json, write_json
from diffplug.plug import plug
from diffplug.samplers.video import LongVideo, Windows
from diffplug.samplers.video.network_axes import NETWORKS, Axes
from diffplug.steering.clips import ClipWeights
from diffplug.testing.closed_form.gaussian_video import ExactContinuation, GaussianVideo

RESULTS = Path(__file__).parent / "results" / "video.json"
FRAMES, WINDOW = 64, 16


def closed_form(_: Any) -> dict[str, Any]:
    """Return variances and correlations of 20,000 Gaussian videos by every scheme."""
    NETWORKS["LinearDenoiser"] = Axes()
    rows: dict[str, Any] = {"whole": moments(_drawn())}
    for overlap, weights, noise in (
        (0, "flat", "iid"),
        (4, "flat", "iid"),
        (4, "pyramid", "iid"),
        (8, "flat", "iid"),
        (8, "pyramid", "iid"),
        (12, "pyramid", "iid"),
        (12, "pyramid", "free"),
        (8, "pyramid", "repeat"),
    ):
        windows = Windows(frames=WINDOW, overlap=overlap, weights=weights, noise=noise)
        rows[f"windows {overlap} {weights} {noise}"] = moments(_drawn(windows))
    for overlap in (1, 4, 8):
        model = ExactContinuation()
        long = LongVideo(None, frames=FRAMES, clip_frames=WINDOW, overlap=overlap, hand_over=model)
        rows[f"continuation {overlap}"] = moments(long(seed=1).frames.reshape(FRAMES, -1).T)
    del NETWORKS["LinearDenoiser"]
    return rows


def _drawn(*plugs: Any) -> torch.Tensor:
    pipe = GaussianVideo()
    with plug(pipe, *plugs):
        return pipe(num_frames=FRAMES, generator=torch.Generator().manual_seed(0))


def moments(x: torch.Tensor) -> dict[str, float]:
    """Return least and mean variance, and correlations by lag, of videos [n, f]."""
    c = np.cov(x.double().numpy(), rowvar=False)
    deviation = np.sqrt(np.diag(c))
    correlation = c / deviation / deviation[:, None]
    figures = {"variance least": np.diag(c).min(), "variance mean": np.diag(c).mean()}
    figures["lag 1 worst"] = np.diagonal(correlation, 1).min()
    for lag in (8, 16, 32, 48):
        figures[f"lag {lag}"] = np.diagonal(correlation, lag).mean()
    return {name: round(float(value), 3) for name, value in figures.items()}


def weights(_: Any, n: int = 20_000) -> dict[str, float]:
    """Return E[Z_hat] / Z of selection clip by clip: 7 clips, 4 candidates, Z = exp(1/2)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 7, 4, generator=generator, dtype=torch.float64).numpy()
    uniform = torch.rand(n, 7, generator=generator, dtype=torch.float64).numpy()
    ends, logw = np.zeros(n), np.zeros(n)
    for i in range(n):
        chain, x = ClipWeights(1.0), 0.0
        for k in range(7):
            drawn = noise[i, k] if k == 0 else 0.8 * x + 0.6 * noise[i, k]
            x = float(drawn[chain.select((0.8 ** (6 - k) * drawn).tolist(), float(uniform[i, k]))])
        ends[i], logw[i] = x, float(chain.log_weight or 0.0)
    z = np.exp(logw - 0.5)
    return {
        "chains": n,
        "E[Z]/Z": round(float(z.mean()), 4),
        "standard error": round(float(z.std() / math.sqrt(n)), 4),
        "mean of the survivors": round(float(ends.mean()), 3),
        "weighted mean (right: 1)": round(float((z * ends).mean() / z.mean()), 3),
    }


def memory(_: Any) -> dict[str, float]:
    """Return the peak resident memory of continuations of 81 and 241 frames, MiB, each in its own process."""
    peaks = {frames: _peak(frames) for frames in (81, 241)}
    told = {f"{frames} frames, MiB": round(peak, 1) for frames, peak in peaks.items()}
    return {**told, "ratio": round(peaks[241] / peaks[81], 4)}


_CONTINUE = """
import resource, sys, torch
sys.path.insert(0, "tests/samplers/video")
import video_pipelines as made
from diffplug.samplers.video import LongVideo
torch.set_num_threads(1)
long = LongVideo(made.wan_i2v(), frames=int(sys.argv[1]), clip_frames=21)
told = {"image": made.picture(64), "prompt": "a", **made.SMALL, "height": 64, "width": 64}
count = sum(1 for frame in long.frames(**told))
assert count == int(sys.argv[1])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def _peak(frames: int) -> float:
    words = [sys.executable, "-W", "ignore", "-c", _CONTINUE, str(frames)]
    found = subprocess.run(words, check=True, capture_output=True, text=True)  # noqa: S603 -- our own words
    return float(next(line for line in found.stdout.splitlines() if line.startswith("peak")).split()[1])


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "closed-form": closed_form,
    "weights": weights,
    "memory": memory,
    "schemes": scheme_figures,
    "chain": chain_figures,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print it and keep it."""
    parser = command(__name__)
    parser.add_argument("--only", choices=PARTS, action="append", help="One part; may be given often.")
    parser.add_argument("--videos", type=int, default=8, help="Videos of every scheme on Moving Shapes.")
    parser.add_argument("--picture", default="shapes@1", help="Sampler of the pictures of `chain`.")
    parser.add_argument("--sheet", type=Path, help="Write a sheet of the schemes instead.")
    parser.add_argument("--animation", type=Path, help="Write an animated sheet instead.")
    parser.add_argument("--plot", type=Path, help="Plot the closed form that was measured before instead.")
    told = parser.parse_args(arguments)
    if told.plot:
        plot(read_json(RESULTS)["closed-form"], told.plot)
        return
    if told.sheet or told.animation:
        draw(told.sheet, told.animation)
        return
    for name in told.only or PARTS:
        figures = PARTS[name](told)
        kept = read_json(RESULTS) if RESULTS.exists() else {}
        write_json(RESULTS, {**kept, name: figures})
        print(f"\n{name}")
        for key, value in figures.items():
            print(f"  {key:<34}{value}")


if __name__ == "__main__":
    main()
