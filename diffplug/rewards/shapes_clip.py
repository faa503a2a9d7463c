"""CLIP score by the small CLIP of the Shapes world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffplug.rewards.networks import NetworkReward
from diffplug.rewards.networks.clip_network import CONFIG, clip_network


class ShapesClipReward(NetworkReward):
    """The cosine between picture and prompt, in [-1, 1], for the Shapes world; differentiable.

    Unlike the grader `shapes` it is learned, smooth and can be wrong, as CLIP score is on other pictures, and
    small enough for tests and demonstrations.

    Args:
        folder: where the recipe wrote the weights; None takes those that the package ships.
    """

    def __init__(self, folder: str | Path | None = None, *, batch: int = 64, dtype: str = "float32") -> None:
        super().__init__(_load, str(folder or shapes_clip_folder()), batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> ShapesClipReward:
        """From a folder that the recipe wrote."""
        return cls(text, **options)


def shapes_clip_folder() -> Path:
    """The folder of the shipped weights, inside the installed package; it may be missing."""
    return Path(__file__).parents[1] / "shapes" / "clip"


def _load(folder: str) -> nn.Module:
    if not (Path(folder) / CONFIG).is_file():
        raise ValueError(
            f"shapes-clip: the weights are missing, {folder!r} holds no {CONFIG}. Train them with "
            f"`python -m diffplug.training.shapes.clip`, or name the folder of a run: shapes-clip:FOLDER"
        )
    return clip_network(folder, None)
