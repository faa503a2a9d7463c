"""Human Preference Score v2.1 (arXiv 2306.09341): a ViT-H-14 CLIP, tuned on which picture people chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffplug.rewards.networks import NetworkReward
from diffplug.rewards.networks.checkpoints import check_weights, hub_file
from diffplug.rewards.networks.clip_network import ClipNetwork, fill, import_open_clip, untrained
from diffplug.rewards.networks.preprocess import Preprocess

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HpsReward(NetworkReward):
    """The cosine between picture and prompt in the tuned CLIP; larger is better, and it is differentiable.

    Pictures that are not square are padded with black rather than cropped, as HPS does.

    Args:
        checkpoint: the file HPS_v2.1_compressed.pt or another of its layout; None takes it from the hub.
        model: the open_clip architecture of the weights.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        model: str = "ViT-H-14",
        batch: int = 8,
        dtype: str = "float32",
    ) -> None:
        where = None if checkpoint is None else str(checkpoint)
        if where is not None:
            check_weights(where, "HPS v2.1")
        super().__init__(_load, where, model, batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> HpsReward:
        """From the path of a checkpoint."""
        return cls(text, **options)


def _load(checkpoint: str | None, name: str) -> nn.Module:
    open_clip = import_open_clip()
    file = hub_file(REPOSITORY, FILE, "HPS v2.1") if checkpoint is None else Path(checkpoint)
    model = untrained(open_clip, name)
    fill(model, file, f"HPS v2.1 ({name})")
    visual: Any = model.visual
    size = visual.preprocess_cfg["size"]
    h, w = (size, size) if isinstance(size, int) else size
    return ClipNetwork(
        model, open_clip.get_tokenizer(name), Preprocess(size=(h, w), resize_mode="longest", clamp=False)
    )
