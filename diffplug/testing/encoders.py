"""Text encoders and image autoencoders of the real classes, as small as they work."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


def gemma_encoder() -> Any:
    """A Gemma 2 language model, 8 wide, one layer."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=128,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    )


def bert_encoder() -> Any:
    """A BERT text encoder, 32 wide, one layer."""
    return BertModel(
        BertConfig(
            vocab_size=193,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def qwen3_encoder(layers: int = 2, head: bool = False) -> Any:
    """A Qwen3 language model, 16 wide; with `head`, the class with a language-model head."""
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=257,
        eos_token_id=258,
    )
    return (Qwen3ForCausalLM if head else Qwen3Model)(config)


def qwen_vl_encoder() -> Any:
    """A Qwen2.5-VL language model, 16 wide, one layer."""
    text = {
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    marks = {
        "image_token_id": 259,
        "video_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    )


def clip_vision_encoder() -> tuple[Any, Any]:
    """A CLIP image encoder, 32 wide, two layers, and the processor of its pictures of 16x16 pixels."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        projection_dim=32,
    )
    processor = CLIPImageProcessor(size=16, crop_size=16)
    return CLIPVisionModelWithProjection(config), processor


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


def dc_autoencoder() -> AutoencoderDC:
    """A deep-compression autoencoder of 4 channels that makes pictures half as large."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
