"""The image-grounded text encoder of BLIP (arXiv 2201.12086): a ViT, and a BERT that looks at its tokens.

Modules are named so that the public weights of ImageReward fit: visual_encoder.blocks.0.attn.qkv.weight,
text_encoder.encoder.layer.0.crossattention.self.key.weight, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Blip", "BlipConfig"]


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """Sizes; the defaults are those of ImageReward (ViT-L/16 and BERT base)."""

    image_size: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_inner: int = 3072
    vocabulary: int = 30524
    positions: int = 512


class Blip(nn.Module):
    """A picture and a text to one vector, the state at the text's first position."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(config)
        self.text_encoder = TextEncoder(config)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors [n, text_width] of normalised pictures and of token ids [n, tokens] with their mask."""
        return self.text_encoder(ids, mask, self.visual_encoder(images))[:, 0]


class VisionTransformer(nn.Module):
    """Tokens [n, 1 + patches, width] of pictures, normalised; the first one belongs to no patch."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width, patches = config.vision_width, (config.image_size // config.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch, config.patch)})
        blocks = (VisionBlock(width, config.vision_heads) for _ in range(config.vision_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionBlock(nn.Module):
    """Attention and a two-layer network, each after a normalisation and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attention(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class TextEncoder(nn.Module):
    """States [n, tokens, width] of texts, every layer of which looks at a picture's tokens."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocabulary, width),
                "position_embeddings": nn.Embedding(config.positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = Layers(config)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        seen = mask.bool()[:, None, None, :]
        return self.encoder(x, seen, image)


class Layers(nn.Module):
    """The layers of the text encoder, one after the other."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))

    def forward(self, x: Tensor, seen: Tensor, image: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, seen, image)
        return x


class TextLayer(nn.Module):
    """Attention to the text, attention to the picture, a two-layer network; normalised after each sum."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width = config.text_width
        self.attention = BertAttention(width, width, config.text_heads)
        self.crossattention = BertAttention(width, config.vision_width, config.text_heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.text_inner)})
        self.output = BertOutput(config.text_inner, width)

    def forward(self, x: Tensor, seen: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, seen)
        x = self.crossattention(x, image, None)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertAttention(nn.Module):
    """Attention of `x` to `source`, added to `x` and normalised."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(source_width, width),
                "value": nn.Linear(source_width, width),
            }
        )
        self.output = BertOutput(width, width)

    def forward(self, x: Tensor, source: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = self.self["query"](x), self.self["key"](source), self.self["value"](source)
        return self.output(attention(q, k, v, self.heads, seen), x)


class BertOutput(nn.Module):
    """A linear layer, added to what came before and normalised."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Multi-head attention of projected [n, tokens, width]; `seen` says which keys count."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.transpose(1, 2).flatten(-2)
