"""Text encoders and image autoencoders of the real classes, as small as they work."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def clip_encoder(projection: bool = False) -> Any:
    """A CLIP text encoder, 32 wide; with `projection`, the class that SDXL and SD3 use."""
    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_encoder(umt5: bool = False) -> Any:
    """A T5 (or UMT5) text encoder, 32 wide, one layer."""
    config, model = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    return model(
        config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, dropout_rate=0.0)
    )


def kl_autoencoder(
    latent_channels: int = 4, blocks: int = 2, quant_convs: bool = True, **config: Any
) -> AutoencoderKL:
    """A KL autoencoder that makes pictures `2 ** (blocks - 1)` times smaller; `config` goes to its class."""
    widths = (8, 16)[:blocks]
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=quant_convs,
        use_post_quant_conv=quant_convs,
        **config,
    )
