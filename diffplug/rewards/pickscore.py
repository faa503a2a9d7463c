"""PickScore (arXiv 2305.01569): a CLIP-H tuned on which of two pictures users of an application picked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from diffplug.messages import reason
from diffplug.rewards.networks import NetworkReward, TextFeatures
from diffplug.rewards.networks.preprocess import Preprocess

REPOSITORY = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Where the tokenizer comes from that PickScore was trained with."""


class PickScoreReward(NetworkReward):
    """Cosine times the model's learned scale (100 at most); larger is better, and it is differentiable.

    Args:
        model: a hub id or a folder in the layout of transformers' CLIPModel. tokenizer: the same for the
        tokenizer; None takes the folder's own, or the one that PickScore was trained with.
    """

    def __init__(
        self,
        model: str | Path = REPOSITORY,
        *,
        tokenizer: str | Path | None = None,
        batch: int = 8,
        dtype: str = "float32",
    ) -> None:
        words = None if tokenizer is None else str(tokenizer)
        super().__init__(_load, str(model), words, batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> PickScoreReward:
        """From a hub id or a folder."""
        return cls(text, **options)


class _PickNetwork(nn.Module):
    """A transformers CLIPModel with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        side = config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side), round_crop=False)
        self.text_features = TextFeatures(self._encode_text)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        model: Any = self.model
        pixels = self.preprocess(images).to(model.logit_scale.dtype)
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        features = F.normalize(model.visual_projection(pooled).float(), dim=-1)
        cosines = (features * self.text_features(prompts, features.device)).sum(-1)
        return model.logit_scale.float().exp() * cosines

    def _encode_text(self, prompts: list[str]) -> Tensor:
        model: Any = self.model
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        ids, mask = (tokens[key].to(model.logit_scale.device) for key in ("input_ids", "attention_mask"))
        pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(model.text_projection(pooled).float(), dim=-1)


def _load(name: str, tokenizer: str | None) -> nn.Module:
    import torch
    from transformers import AutoTokenizer, CLIPModel

    here = Path(name).is_dir()
    own = here and any((Path(name) / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    source = tokenizer or (name if own else TOKENIZER)
    try:
        model, told = CLIPModel.from_pretrained(
            name, dtype=torch.float32, local_files_only=here, output_loading_info=True
        )
        words = AutoTokenizer.from_pretrained(source)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"PickScore: {name!r} (tokenizer {source!r}) cannot be loaded as a transformers CLIPModel: "
            f"{reason(error)}. Run once with a connection, or give a folder with config.json, "
            f"model.safetensors and a tokenizer."
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"PickScore: {name!r} lacks {len(missing)} tensors of a CLIPModel ({', '.join(missing[:3])}): "
            f"download it again, or give a folder in the layout of {REPOSITORY}."
        )
    return _PickNetwork(model, words)
