"""ImageReward (arXiv 2304.05977): BLIP and a small network on top, trained on ranked pictures of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.messages import reason
from diffplug.rewards.networks import NetworkReward
from diffplug.rewards.networks.blip import Blip, BlipConfig
from diffplug.rewards.networks.checkpoints import check_weights, hub_file, load_into, read_weights
from diffplug.rewards.networks.preprocess import Preprocess

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35
"""Length of a prompt, to which it is cut or padded."""

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the authors' data; the reward is standardised by them."""


class ImageRewardReward(NetworkReward):
    """A score of about mean 0 and deviation 1 over ordinary pictures; larger is better; differentiable.

    Args:
        checkpoint: the file ImageReward.pt or another of its layout; None takes it from the hub. tokenizer: a
        hub id or folder with BERT's uncased English tokenizer. config: sizes of the network in the file.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        tokenizer: str | Path = TOKENIZER,
        config: BlipConfig | None = None,
        batch: int = 8,
        dtype: str = "float32",
    ) -> None:
        where = None if checkpoint is None else str(checkpoint)
        if where is not None:
            check_weights(where, "ImageReward")
        sizes = config or BlipConfig()
        super().__init__(_load, where, str(tokenizer), sizes, batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> ImageRewardReward:
        """From the path of a checkpoint."""
        return cls(text, **options)


class Head(nn.Module):
    """Five linear layers from the features to one number; dropout between them acts in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class ImageRewardNetwork(nn.Module):
    """BLIP and the head; `tokenizer` may be set later."""

    def __init__(self, config: BlipConfig, tokenizer: Any = None) -> None:
        super().__init__()
        self.blip = Blip(config)
        self.mlp = Head(config.text_width)
        self.tokenizer = tokenizer
        self.preprocess = Preprocess(size=(config.image_size, config.image_size))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [n] of pictures [n, 3, h, w] in [0, 1] for n prompts."""
        weight = next(self.mlp.parameters())
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        ids, mask = (tokens[key].to(weight.device) for key in ("input_ids", "attention_mask"))
        features = self.blip(self.preprocess(images).to(weight.dtype), ids, mask)
        return (self.mlp(features)[:, 0].float() - MEAN) / STD


def unused(state: dict[str, Tensor]) -> list[str]:
    """Tensors of a public file that scoring does not need: BLIP's contrastive heads, a row of positions."""
    extra = ("blip.vision_proj.", "blip.text_proj.")
    return [key for key in state if key.startswith(extra) or key.endswith("embeddings.position_ids")]


def _load(checkpoint: str | None, tokenizer: str, config: BlipConfig) -> nn.Module:
    what = "ImageReward"
    file = hub_file(REPOSITORY, FILE, what) if checkpoint is None else Path(checkpoint)
    state = read_weights(file, what)
    with torch.random.fork_rng(devices=[]):  # random first weights must not move the caller's generator
        network = ImageRewardNetwork(config)
    load_into(network, state, file, what, ignored=unused(state))
    network.tokenizer = _tokenizer(tokenizer)
    return network


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"ImageReward: the tokenizer {source!r} is not here and did not come ({reason(error)}). "
            f"Run once with a connection, or give tokenizer=, a folder with BERT's uncased tokenizer."
        ) from error
