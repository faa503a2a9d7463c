"""Tiny pipelines of flow models with a language model for their text: Chroma, FLUX.2, Z-Image, Sana, ..."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from diffplug.testing.encoders import (
    dc_autoencoder,
    gemma_encoder,
    kl_autoencoder,
    qwen3_encoder,
    t5_encoder,
)
from diffplug.testing.tokenizers import gemma_tokenizer, qwen_tokenizer, t5_tokenizer


def chroma() -> ChromaPipeline:
    denoiser = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=kl_autoencoder(
            latent_channels=1, blocks=1, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=denoiser,
    )


def flux2_klein() -> Flux2KleinPipeline:
    denoiser = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        max_image_seq_len=4096,
    )
    return Flux2KleinPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=qwen3_encoder(head=True),
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    )


def z_image() -> ZImagePipeline:
    denoiser = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # the two padding tokens are memory that nobody wrote to
        denoiser.x_pad_token.normal_(std=0.02)
        denoiser.cap_pad_token.normal_(std=0.02)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(latent_channels=16, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    )


def lumina2() -> Lumina2Pipeline:
    denoiser = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(256, 32, 32),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_autoencoder(blocks=1, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )


def auraflow() -> AuraFlowPipeline:
    denoiser = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(umt5=True),
        vae=kl_autoencoder(scaling_factor=0.13025),
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def sana() -> SanaPipeline:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(**_sana_parts(), scheduler=scheduler)


def sana_sprint() -> SanaSprintPipeline:
    """Sana's consistency model, with embedded guidance and angles for times."""
    parts = _sana_parts(guidance_embeds=True, guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads")
    return SanaSprintPipeline(**parts, scheduler=SCMScheduler())


def _sana_parts(**config: Any) -> dict[str, Any]:
    """What both pipelines of the Sana family take, but for the scheduler."""
    denoiser = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        **config,
    )
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": gemma_encoder(),
        "vae": dc_autoencoder(),
        "transformer": denoiser,
    }
