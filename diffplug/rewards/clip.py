"""CLIP score (arXiv 2104.08718): how well a picture matches its prompt, by any model of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffplug.rewards.networks import NetworkReward
from diffplug.rewards.networks.clip_network import clip_network


class ClipReward(NetworkReward):
    """The cosine between picture and prompt, in [-1, 1]; larger is better, and it is differentiable.

    Costs one pass of the image tower a picture, and one of the text tower for every new prompt.

    Args:
        model: a name that open_clip knows, a folder with open_clip_config.json, or "hf-hub:owner/name".
        pretrained: a tag of that name or a weight file (safetensors, or tensors that torch saved); not for
        folders and hub ids. batch: pictures in one pass. dtype: of the weights.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        *,
        batch: int = 16,
        dtype: str = "float32",
    ) -> None:
        whole = model.startswith("hf-hub:") or Path(model).is_dir()
        super().__init__(clip_network, model, None if whole else pretrained, batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> ClipReward:
        """From "MODEL/WEIGHTS" (a tag or a file), a folder, or "hf-hub:owner/name"."""
        if text.startswith("hf-hub:") or Path(text).is_dir():
            return cls(text, **options)
        model, slash, pretrained = text.partition("/")
        return cls(model, pretrained if slash else None, **options)
