"""The closed form as a picture: correlation of a video's frames by their distance, for every scheme."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffplug.files import atomic_path

__all__ = ["plot"]

LAGS = (8, 16, 32, 48)
_SHOWN = {
    "whole": "the model's own long video",
    "windows 8 pyramid iid": "windows, fused",
    "windows 12 pyramid free": "windows, free noise",
    "continuation 1": "continuation, 1 frame",
    "continuation 8": "continuation, 8 frames",
}


def plot(figures: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Write the plot of `benchmarks.video --only closed-form`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2))
    for key, label in _SHOWN.items():
        row: Mapping[str, Any] = figures[key]
        values = [1.0, row["lag 1 worst"], *(row[f"lag {lag}"] for lag in LAGS)]
        style = "k--" if key == "whole" else "o-"
        left.plot([0, 1, *LAGS], values, style, label=label, markersize=4)
    left.set_xlabel("frames apart (a window is 16)")
    left.set_ylabel("correlation")
    left.legend(fontsize=7, loc="upper right", bbox_to_anchor=(1.0, 0.88))
    right.barh([*_SHOWN.values()][::-1], [figures[key]["variance mean"] for key in _SHOWN][::-1], color="0.6")
    right.set_xlabel("variance (right: 1)")
    right.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
