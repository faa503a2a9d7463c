"""Tiny pipelines of the families with a transformer: SD3, FLUX, Qwen-Image; PixArt, DiT, Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from diffplug.testing.encoders import bert_encoder, clip_encoder, kl_autoencoder, qwen_vl_encoder, t5_encoder
from diffplug.testing.tokenizers import bert_tokenizer, clip_tokenizer, qwen_tokenizer, t5_tokenizer


def sd3() -> StableDiffusion3Pipeline:
    denoiser = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,  # two pooled encoders of 32
    )
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(blocks=1, quant_convs=False, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip_encoder(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(**_flux_parts(), scheduler=scheduler)


def flux_schnell() -> FluxPipeline:
    """FLUX as its few-step model has it: no embedded guidance, and no dynamic shifting of sigmas."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return FluxPipeline(**_flux_parts(guidance_embeds=False), scheduler=scheduler)


def flux_img2img() -> FluxImg2ImgPipeline:
    return FluxImg2ImgPipeline(**flux().components)


def _flux_parts(guidance_embeds: bool = True) -> dict[str, Any]:
    """What every pipeline of the FLUX family takes, but for the scheduler."""
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return {
        "vae": kl_autoencoder(
            latent_channels=1, blocks=1, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159
        ),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": denoiser,
    }


def pixart() -> PixArtAlphaPipeline:
    denoiser = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=kl_autoencoder(scaling_factor=0.18215),
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(),
    )


def qwenimage() -> QwenImagePipeline:
    denoiser = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 0.9, 1.1, 1.2],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=qwen_vl_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    )


def dit() -> DiTPipeline:
    """A transformer that is told a class instead of a prompt; half of its output is a variance."""
    denoiser = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,  # the pipeline calls class 1000 "none"
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer=denoiser, vae=kl_autoencoder(scaling_factor=0.18215), scheduler=scheduler)


def hunyuandit() -> HunyuanDiTPipeline:
    denoiser = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        hidden_size=24,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=True,
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.018,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    return HunyuanDiTPipeline(
        transformer=denoiser,
        vae=kl_autoencoder(scaling_factor=0.13025),
        text_encoder=bert_encoder(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(max_length=256),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
