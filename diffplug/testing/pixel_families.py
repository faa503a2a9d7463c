"""Tiny pipelines that make pixels without an autoencoder: DDPM, DDIM, consistency models, DeepFloyd IF."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    IFPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffplug.testing.encoders import t5_encoder
from diffplug.testing.tokenizers import t5_tokenizer

_SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def ddpm() -> DDPMPipeline:
    return DDPMPipeline(unet=_unet(), scheduler=DDPMScheduler())


def ddim() -> DDIMPipeline:
    return DDIMPipeline(unet=_unet(), scheduler=DDIMScheduler())


def consistency() -> ConsistencyModelPipeline:
    """A consistency model of a class: 40 steps of training, a network that hands back the clean picture."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return ConsistencyModelPipeline(unet=_unet(num_class_embeds=10), scheduler=scheduler)


def _unet(**config: Any) -> UNet2DModel:
    return UNet2DModel(
        **_SIZES,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def deepfloyd_if() -> IFPipeline:
    """The first stage of DeepFloyd IF: pixels from T5 text; half of the output is a learned variance."""
    denoiser = UNet2DConditionModel(
        **_SIZES,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        only_cross_attention=(True, False),
        cross_attention_dim=32,
        encoder_hid_dim=32,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    return IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
