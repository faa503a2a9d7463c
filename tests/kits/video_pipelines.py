"""Tiny video pipelines that begin with given frames, and bare video networks; random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from diffplug.testing import tiny
from diffplug.testing.encoders import t5_encoder
from diffplug.testing.tokenizers import t5_tokenizer

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 64,
}
SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16}
SMALL_LTX = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}


def picture(size: int = 16, seed: int = 0) -> Tensor:
    """A picture [1, 3, size, size] in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_parts() -> dict[str, Any]:
    """What all of Wan's pipelines have beside a network."""
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(umt5=True),
        "vae": wan_vae(),
        "scheduler": flow_unipc(),
    }


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def flow_unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_i2v() -> WanImageToVideoPipeline:
    """Wan 2.1 I2V: picture latents and mask in channels, CLIP embeddings of the picture."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    network = WanTransformer3DModel(**{**WAN, "in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24})
    return _quiet(
        WanImageToVideoPipeline(
            **wan_parts(),
            transformer=network,
            image_encoder=CLIPVisionModel(config),
            image_processor=CLIPImageProcessor(size=32, crop_size=32),
        )
    )


def wan_ti2v() -> WanImageToVideoPipeline:
    """Wan 2.2 TI2V-5B: the first latent is given, timesteps are told token by token."""
    torch.manual_seed(0)
    return _quiet(
        WanImageToVideoPipeline(
            **wan_parts(), transformer=WanTransformer3DModel(**WAN), expand_timesteps=True
        )
    )


def wan_vace() -> WanVACEPipeline:
    torch.manual_seed(0)
    network = WanVACETransformer3DModel(**{**WAN, "num_layers": 2}, vace_layers=[0, 1], vace_in_channels=96)
    return _quiet(WanVACEPipeline(**wan_parts(), transformer=network))


def ltx_condition() -> LTXConditionPipeline:
    """LTX 0.9.5 and later: frames given as conditions, positions told as coordinates."""
    parts = {**tiny("ltx").components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return _quiet(LTXConditionPipeline(**parts))


def ltx_i2v() -> LTXImageToVideoPipeline:
    return _quiet(LTXImageToVideoPipeline(**tiny("ltx").components))


def hunyuan() -> tuple[Any, dict[str, Any], int]:
    """HunyuanVideo's network, the arguments of a call on 9 latent frames, and its frame axis."""
    torch.manual_seed(0)
    network = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 4, 9, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }
    return network, call, 2


def mochi() -> tuple[Any, dict[str, Any], int]:
    torch.manual_seed(0)
    network = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 12, 9, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "encoder_attention_mask": torch.ones(1, 6).bool(),
    }
    return network, call, 2


def latte() -> tuple[Any, dict[str, Any], int]:
    torch.manual_seed(0)
    network = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=4,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 4, 9, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
    }
    return network, call, 2
