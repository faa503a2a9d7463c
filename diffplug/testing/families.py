"""Tiny pipelines with a UNet in latent space: Stable Diffusion and its kin, SDXL, Kandinsky."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)

from diffplug.testing.encoders import clip_encoder, kl_autoencoder
from diffplug.testing.tokenizers import clip_tokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet(**config: Any) -> UNet2DConditionModel:
    """Stable Diffusion's denoiser; `config` changes it."""
    settings = {
        **_SIZES,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**settings, **config})


def sd_parts(**unet_config: Any) -> dict[str, Any]:
    """What every pipeline of the Stable Diffusion family takes, but for the scheduler."""
    return {
        "vae": kl_autoencoder(scaling_factor=0.18215),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(**unet_config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def ddim() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**sd_parts(), scheduler=ddim())


def sd15_img2img() -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**sd_parts(), scheduler=ddim())


def sd15_inpaint() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion's inpainting model: it also sees the mask and the masked picture."""
    return StableDiffusionInpaintPipeline(**sd_parts(in_channels=9), scheduler=ddim())


def controlnet() -> StableDiffusionControlNetPipeline:
    parts = sd_parts()
    extra = ControlNetModel(
        **_SIZES,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    return StableDiffusionControlNetPipeline(**parts, controlnet=extra, scheduler=ddim())


def lcm() -> LatentConsistencyModelPipeline:
    parts = sd_parts(time_cond_proj_dim=32)
    scheduler = LCMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=True)
    return LatentConsistencyModelPipeline(**parts, scheduler=scheduler)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(**_sdxl_parts())


def sdxl_img2img() -> StableDiffusionXLImg2ImgPipeline:
    return StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())


def sdxl_inpaint() -> StableDiffusionXLInpaintPipeline:
    """SDXL's own network, whose latents are put back outside the mask after every step."""
    return StableDiffusionXLInpaintPipeline(**_sdxl_parts())


def _sdxl_parts() -> dict[str, Any]:
    """What every pipeline of the SDXL family takes."""
    denoiser = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,  # six numbers of 8, and the pooled 32
        cross_attention_dim=64,
    )
    return {
        "vae": kl_autoencoder(scaling_factor=0.13025),
        "text_encoder": clip_encoder(),
        "text_encoder_2": clip_encoder(projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": denoiser,
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        "add_watermarker": False,
    }


def kandinsky22() -> KandinskyV22Pipeline:
    """Kandinsky 2.2's decoder: from picture embeddings; half of the output is a learned variance."""
    denoiser = UNet2DConditionModel(
        **_SIZES,
        sample_size=8,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    movq = VQModel(
        block_out_channels=(32, 32),  # its norms have 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=True,
        clip_sample_range=2.0,
        variance_type="learned_range",
        sample_max_value=2.0,
    )
    return KandinskyV22Pipeline(unet=denoiser, scheduler=scheduler, movq=movq)
